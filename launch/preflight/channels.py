"""Processes that run one of our modules on every host and exchange lines with this one.

Over ssh there is one process per host, under srun one for all hosts (srun copies each line of input to every task), and
otherwise one on this machine. Each host must have the same Python and the same current folder at the same paths.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from elas.launch.preflight.probe import Answers
from elas.launch.ssh.remote import ssh_command

NO_FOLDER, NO_PYTHON = 90, 91
_SCRIPT = f'cd -- "$0" 2>/dev/null || exit {NO_FOLDER}; test -x "$1" || exit {NO_PYTHON}; shift; exec env "$@"'
_EXITED = re.compile(r"tasks? ([\d,-]+): Exited with exit code (\d+)")
_LABEL = re.compile(r"^ *(\d+): ")
_numbers = itertools.count()
POLL_S = 0.2
GONE_S = 3.0
"""Seconds that a process has to end by itself after its input is closed."""


@dataclass(frozen=True)
class Way:
    """How hosts are reached.

    Attributes:
        kind: `ssh`, `srun` or `here`.
        python: path of the Python to run, the same on every host.
        variables: environment variables to set on the hosts.
        options: further options of srun.
    """

    kind: str
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def command(self, words: list[str]) -> list[str]:
        """The command that runs Python with the arguments `words` in this process's current folder."""
        given = [f"{name}={value}" for name, value in self.variables.items()]
        return ["sh", "-c", _SCRIPT, os.getcwd(), self.python, *given, self.python, *words]

    def start(self, hosts: list[str], words: dict[str, list[str]]) -> "list[Channel]":
        """Start Python with `words[host]` on every host; under srun the first host's words run on all of them."""
        if self.kind == "ssh":
            return [Channel(ssh_command(host, self.command(words[host])), [host]) for host in hosts]
        command = self.command(words[hosts[0]])
        if self.kind == "srun":
            size = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
            command = ["srun", *size, *self.options, "--label", "--kill-on-bad-exit=0", "--", *command]
        return [Channel(command, hosts)]


@dataclass(frozen=True)
class NoAnswer:
    """What is known of a host that did not answer: its exit status (None: still running) and error output."""

    status: int | None
    error: str


class Channel:
    """A process whose answers are read in the background.

    Args:
        command: the command to start.
        hosts: the hosts that answer through this process.

    Attributes:
        answering: the hosts that have answered every question so far.
    """

    def __init__(self, command: list[str], hosts: list[str]):
        self.hosts, self.answering = hosts, set(hosts)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is handled by this process only
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr  # all are pipes
        self._stdin = self._process.stdin
        self._answers: queue.Queue = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stdout: IO[str]) -> None:
        answers = Answers()
        for line in stdout:
            answer = answers.take(line.rstrip("\n"))
            if answer is not None:
                self._answers.put(answer)
        self._answers.put(None)

    def _read_errors(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._errors.append(line.rstrip())

    def send(self, line: str) -> None:
        """Send a line; ignored if the process has ended."""
        with contextlib.suppress(OSError):
            self._stdin.write(f"{line}\n")
            self._stdin.flush()

    def receive(self, until: float) -> tuple[str, dict] | None:
        """The next answer, as host and content; None after the last one, or at `until` (of `time.monotonic`)."""
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            if answer is None:
                self._answers.put(None)  # keep the end marker for the next call
            return answer
        return None

    def gone(self) -> set[str]:
        """Hosts that will send no further answer."""
        if self._process.poll() is not None and not self._readers[0].is_alive():
            return set(self.hosts) if self._answers.queue[0] is None else set()
        tasks = {task for line in list(self._errors) for task in _exited(line)[0]}
        return {self.hosts[task] for task in tasks}

    def status(self) -> int | None:
        """The process's exit status; None while it runs."""
        return self._process.poll()

    def why(self, host: str) -> NoAnswer:
        """Why a host did not answer; call it after `receive` returned None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if self._process.poll() is not None:
            self._readers[1].join(1.0)
        status, lines = self._process.poll(), list(self._errors)
        if len(self.hosts) > 1 or any(map(_LABEL.match, lines)):
            task = self.hosts.index(host)
            status = next((code for tasks, code in map(_exited, lines) if task in tasks), status)
            ours = [line.split(": ", 1)[1] for line in lines if (m := _LABEL.match(line)) and int(m[1]) == task]
            lines = ours or [line for line in lines if not _LABEL.match(line)]
        return NoAnswer(status, "\n".join(line for line in lines if line.strip()))

    def end(self) -> None:
        """End the process by closing its input; terminate or kill it if that does not help."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # srun ends its tasks
            try:
                self._process.wait(GONE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _exited(line: str) -> tuple[set[int], int]:
    """Parse srun's `error: n2: task 1: Exited with exit code 91` into the task numbers and the code."""
    match = _EXITED.search(line)
    if match is None:
        return set(), 0
    tasks: set[int] = set()
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        tasks |= set(range(int(first), int(last or first) + 1))
    return tasks, int(match[2])


@contextmanager
def open_channels(way: Way, hosts: list[str], words: dict[str, list[str]]) -> Iterator[list[Channel]]:
    """Open channels to every host; they are ended when the block is left."""
    channels = way.start(hosts, words)
    try:
        yield channels
    finally:
        threads = [threading.Thread(target=channel.end) for channel in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def ask(channels: list[Channel], question: dict, timeout_s: float) -> dict[str, dict]:
    """Ask the probe of every host that has answered so far.

    Returns:
        The answers by host; hosts that do not answer in time are not asked again.
    """
    number = next(_numbers)
    for channel in channels:
        channel.send(json.dumps({"number": number, **question}))
    until = time.monotonic() + timeout_s
    found: dict[str, dict] = {}
    for channel in channels:
        while missing := channel.answering - found.keys():
            answer = channel.receive(min(until, time.monotonic() + POLL_S))
            if answer is not None and answer[1].pop("number") == number:  # else a late answer to an earlier question
                found[answer[0]] = answer[1]
            elif answer is None and (time.monotonic() > until or missing <= channel.gone()):
                break
        channel.answering &= found.keys()
    return found
