"""Starts, watches and ends the processes of a check.

A process is in a session of its own, so that Ctrl-C reaches the command alone, which then ends all of them; if the
command is killed, the kernel ends them (PR_SET_PDEATHSIG).
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from elas.launch.guard.processes import descendants, end_with_parent, kill, signal_name

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
_QUIET = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
_TAIL = 8192
_SHOWN = 200


def start(
    command: list[str], log: Path, variables: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen:
    """Start a process without a launcher's variables; both outputs go to the end of `log`."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | _QUIET
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment | dict(variables or {}),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def wait(process: subprocess.Popen, seconds: float, tick: Callable[[], None] = lambda: None) -> bool:
    """Wait for a process, calling `tick` four times a second; False if it still runs after `seconds`."""
    until = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        tick()
        time.sleep(0.25)
    return True


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    if process.poll() is not None:
        return
    below = descendants(process.pid)
    process.kill()
    kill(below)
    process.wait()


def ended(process: subprocess.Popen, log: Path) -> str:
    """How a process ended, and the last line of its log."""
    status = process.returncode
    how = f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"
    return f"{how}; {log.name} ends: {last_line(log)}"


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, at most 200 characters of it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
