"""Processes that run one of our modules on every host of a run, and talk to this one in lines.

Over ssh that is a process for each host, under srun one for all of them (srun hands each line of input to every task),
and without either one on this machine. The module is found by the same Python in the same folder as here, or the host
is said not to have it.
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

from elas.launch.preflight.probe import Answers
from elas.launch.ssh.remote import ssh_command

NO_FOLDER, NO_PYTHON = 90, 91
_SCRIPT = f'cd -- "$0" 2>/dev/null || exit {NO_FOLDER}; test -x "$1" || exit {NO_PYTHON}; shift; exec env "$@"'
_EXITED = re.compile(r"tasks? ([\d,-]+): Exited with exit code (\d+)")
_LABEL = re.compile(r"^ *(\d+): ")
_numbers = itertools.count()
POLL_S = 0.2
GONE_S = 3.0
"""What a process has to end by itself when its input does."""


@dataclass(frozen=True)
class Way:
    """How hosts are reached.

    Attributes:
        kind: `ssh`, `srun` or `here`.
        python: the Python to run, at this path on every host.
        variables: environment variables to set there.
        options: srun's.
    """

    kind: str
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def command(self, words: list[str]) -> list[str]:
        """`words`, an interpreter's arguments, run in the folder that is current here."""
        given = [f"{name}={value}" for name, value in self.variables.items()]
        return ["sh", "-c", _SCRIPT, os.getcwd(), self.python, *given, self.python, *words]

    def start(self, hosts: list[str], words: dict[str, list[str]]) -> "list[Channel]":
        """Start `words[host]` on every host; under srun the words of the first host on all of them."""
        if self.kind == "ssh":
            return [Channel(ssh_command(host, self.command(words[host])), [host]) for host in hosts]
        command = self.command(words[hosts[0]])
        if self.kind == "srun":
            size = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
            command = ["srun", *size, *self.options, "--label", "--kill-on-bad-exit=0", "--", *command]
        return [Channel(command, hosts)]


@dataclass(frozen=True)
class NoAnswer:
    """What is known of a host that did not answer: its exit status (None: it still runs), and its last words."""

    status: int | None
    error: str


class Channel:
    """A process whose answers are read as they come.

    Args:
        command: the process.
        hosts: those that answer through it.

    Attributes:
        answering: those that `ask` still counts on.
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
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        self._answers: queue.Queue = queue.Queue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        answers = Answers()
        for line in self._process.stdout:
            whole = answers.take(line.rstrip("\n"))
            if whole is not None:
                self._answers.put(whole)
        self._answers.put(None)

    def _read_errors(self) -> None:
        for line in self._process.stderr:
            self._errors.append(line.rstrip())

    def send(self, line: str) -> None:
        """Send a line, unless nobody is there any more."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def receive(self, until: float) -> tuple[str, dict] | None:
        """The next host's answer; None when no more comes, or not before `until` (of `time.monotonic`)."""
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            if answer is None:
                self._answers.put(None)
            return answer
        return None

    def gone(self) -> set[str]:
        """Hosts that will not answer any more, all answers read."""
        if self._process.poll() is not None and not self._readers[0].is_alive():
            return set(self.hosts) if self._answers.queue[0] is None else set()
        tasks = {task for line in list(self._errors) for task in _exited(line)[0]}
        return {self.hosts[task] for task in tasks}

    def status(self) -> int | None:
        """The process's exit status; None while it runs."""
        return self._process.poll()

    def why(self, host: str) -> NoAnswer:
        """Why a host did not answer, once `receive` gave None."""
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
        """End the process: by the end of its input, else by force."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
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
    """srun's `error: n2: task 1: Exited with exit code 91`: the tasks, and the code."""
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
    """Channels to every host, which end with the block."""
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
        The answer of each host that gives one in time; the others are asked no more.
    """
    number = next(_numbers)
    for channel in channels:
        channel.send(json.dumps({"number": number, **question}))
    until = time.monotonic() + timeout_s
    found: dict[str, dict] = {}
    for channel in channels:
        while missing := channel.answering - found.keys():
            answer = channel.receive(min(until, time.monotonic() + POLL_S))
            if answer is not None and answer[1].pop("number") == number:  # else to a question before, too late
                found[answer[0]] = answer[1]
            elif answer is None and (time.monotonic() > until or missing <= channel.gone()):
                break
        channel.answering &= found.keys()
    return found
