"""Descendant processes, read from /proc: which are ranks, which are stopped, how one ended."""

import contextlib
import ctypes
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STATE, _PARENT, _EXIT_STATUS = 0, 1, 49  # indices of the fields of /proc/PID/stat after the process name


@dataclass(frozen=True)
class Process:
    """A snapshot of a process.

    Attributes:
        pid: process ID.
        parent: the parent's process ID.
        state: R, S, D: alive; T: stopped; Z: ended but not yet reaped.
        status: wait status of an ended process, as from `os.waitpid`.
        rank: RANK from its environment; None for other processes, and for children of a rank.
    """

    pid: int
    parent: int
    state: str
    status: int
    rank: int | None


def adopt_orphans() -> None:
    """Make this process the parent of all its orphaned descendants (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int | None = None) -> list[Process]:
    """All descendants of `pid` (default: this process), parents before their children."""
    found, below = [], [(child, False) for child in _children(pid or os.getpid())]
    while below:
        child, inside = below.pop(0)
        process = _read(child, inside)
        if process is not None:
            found.append(process)
            below += [(c, inside or process.rank is not None) for c in _children(child)]
    return found


def kill(processes: list[Process], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes; those that have ended are skipped."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def catches(process: Process, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # a thread that ended meanwhile
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _read(pid: int, inside_rank: bool) -> Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None  # gone
    rank = None if inside_rank else _rank(pid)
    return Process(pid, int(fields[_PARENT]), fields[_STATE], int(fields[_EXIT_STATUS]), rank)


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    value = next((v[5:] for v in variables if v.startswith(b"RANK=")), b"")
    return int(value) if value.isdigit() else None


def status_in_words(status: int) -> str:
    """A wait status of `os.waitpid` as text: `was killed by SIGKILL`, `ended with status 1`."""
    if os.WIFSIGNALED(status):
        return f"was killed by {signal_name(os.WTERMSIG(status))}"
    return f"ended with status {os.WEXITSTATUS(status)}"


def signal_name(number: int) -> str:
    """A signal's name, or `signal N` if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_code(status: int) -> int:
    """A wait status of `os.waitpid` as a shell's exit status: 128 + n if signal n killed the process."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def status_within(process: subprocess.Popen, seconds: float) -> int | None:
    """Wait at most `seconds` for a child; returns its exit status (128 + n for signal n), or None while it runs."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    return status if status >= 0 else 128 - status
