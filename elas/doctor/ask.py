"""Runs the child processes of `elas doctor` (worker.py), side by side, under one deadline."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

WORKER = Path(__file__).with_name("worker.py")
EVERY_S = 0.05


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        value: what worker.py returned; None after an error.
        error: why there is no value, or None.
        finished: False if the deadline passed first.
    """

    value: Any = None
    error: str | None = None
    finished: bool = True


class _Worker:
    """A child process with its questions; starts another one for the remaining questions after a crash."""

    def __init__(self, questions: Sequence[str]):
        self.left = list(questions)
        self.answers: dict[str, Answer] = {}
        # Files in memory: full disks are among what is looked for. The child writes; this process reads by position.
        self._out, self._err = os.memfd_create("answers"), os.memfd_create("messages")
        self._process: subprocess.Popen[str] | None = None
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._out)
        os.close(self._err)

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=self._out,
                stderr=self._err,
                text=True,
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
                start_new_session=True,  # so that its own children can be killed with it
            )
        except OSError as error:
            self.answers |= dict.fromkeys(self.left, Answer(error=f"no process can be started: {error.strerror}"))
            self.left.clear()
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            json.dump({"path": sys.path, "ask": self.left}, pipe)

    def is_done(self) -> bool:
        """Whether all questions are answered; after a crash, the question that caused it has the error."""
        ended = self._process is None or self._process.poll() is not None
        begun = self.current()
        if ended and self.left:
            crashed = begun if begun in self.left else self.left[0]
            self.answers[crashed] = Answer(error=self._why())
            self.left.remove(crashed)
            if self.left:
                self._start()
        return ended and not self.left

    def current(self) -> str | None:
        """Read new answers; returns the question being answered, None between two."""
        begun = None
        for line in _text(self._out).splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                found = json.loads(line)
                begun, question = found.get("begin"), found.get("question")
                if question in self.left:
                    self.answers[question] = Answer(found["value"], found["error"])
                    self.left.remove(question)
        return begun

    def _why(self) -> str:
        code = self._process.returncode if self._process is not None else 0
        words = (_text(self._err).strip().splitlines() or ["no message"])[-1]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the process crashed with {how}: {words}"


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def ask(
    groups: Sequence[Sequence[str]], timeout_s: float, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Answer]:
    """Answer questions in child processes.

    Args:
        groups: questions of worker.py, a process for each group.
        timeout_s: seconds after which the processes are killed; their open questions are then `not finished`.
        progress: called with what is being done, about every `EVERY_S`.

    Returns:
        An answer for every question.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(group)) for group in groups]
        while not all([worker.is_done() for worker in workers]) and time.monotonic() < deadline:
            running = [name for worker in workers if worker.left and (name := worker.current())]
            if running:
                progress(", ".join(running))
            time.sleep(EVERY_S)
        found = {}
        for worker, group in zip(workers, groups):
            at = worker.current() or next((name for name in group if name not in worker.answers), None)
            for name in group:
                slow = "" if name == at else f"{at} "
                why = f"not checked ({slow}took longer than {timeout_s:g} s)"
                found[name] = worker.answers.get(name, Answer(error=why, finished=False))
        return found
