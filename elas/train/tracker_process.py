"""Runs a tracker in a child process, so that it can neither end nor block a run: what hangs is killed.

    parent → child   standard input, lines of JSON: {"path", "name", "run"}, {"step", "values"} …, {"close": failed}
    child → parent   standard output, lines of JSON: {"id"}, {"say"}, {"failed"}
    the tracker's own output and warnings → RUN_DIR/trackers/NAME.log

The parent never waits for the child before the end of the run: its pipe does not block, and what does not fit is kept
until the next row. The child has a session of its own, so it has no terminal to ask for a password on and Ctrl-C does
not reach it; it closes the run as failed when its input ends without a `close`, because the parent died.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # the child imports nothing of `elas` before its `sys.path` is the parent's
    from elas.train.trackers import TrackedRun

MOST_PENDING = 2**25
"""Bytes that the child may be behind."""
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_LOCALID", "SLURM_PROCID")
"""Variables that the child does not get: it is no rank."""


class TrackerProcess:
    """A `Tracker` in a child process.

    Args:
        name: of the tracker.
        run: what the tracker is given.
        say: prints a line.
        keep: takes the tracker's own name of the run, to be given when the run is resumed.
        open_s: longest time in seconds until the tracker is ready for rows, during which the run goes on.
        close_s: longest time in seconds that `close` waits.

    Raises:
        OSError: the child cannot be started, or its log cannot be written.
    """

    def __init__(
        self,
        name: str,
        run: "TrackedRun",
        say: Callable[[str], None],
        keep: Callable[[str], None],
        *,
        open_s: float,
        close_s: float,
    ):
        self._name, self._say, self._keep, self._close_s = name, say, keep, close_s
        self._log = Path(run.folder) / "trackers" / f"{name}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={key: value for key, value in os.environ.items() if key not in _OF_A_RANK},
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        for pipe in (self._in, self._out):
            os.set_blocking(pipe.fileno(), False)
        self._pending, self._heard = b"", b""
        self._ready_by: float | None = time.monotonic() + open_s
        self._send({"path": sys.path, "name": name, "run": dataclasses.asdict(run)})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send a row, and report what the tracker has said since the last one.

        Raises:
            RuntimeError: the tracker failed, takes too long to start, or takes no rows.
        """
        self._send({"step": step, "values": values})
        self._hear()
        if self._process.poll() is not None:
            raise RuntimeError(f"its process ended with status {self._process.returncode}; {self._where}")
        if self._ready_by is not None and time.monotonic() > self._ready_by:
            self._kill("did not start in time")
        if len(self._pending) > MOST_PENDING:
            self._kill(f"is {MOST_PENDING // 2**20} MiB of rows behind")

    def close(self, failed: bool) -> None:
        """Let the tracker write and upload what it has, for `close_s` at most.

        Raises:
            RuntimeError: the tracker failed or was killed after that time.
        """
        end = time.monotonic() + self._close_s
        self._send({"close": failed})
        while self._process.poll() is None:
            if time.monotonic() > end:
                self._kill(f"did not finish within {self._close_s:g} s")
            self._send()
            select.select([self._out], [], [], 0.05)
            self._hear()
        self._hear()
        self._close_pipes()
        if self._process.returncode:
            raise RuntimeError(f"its process ended with status {self._process.returncode}; {self._where}")

    @property
    def _where(self) -> str:
        return f"its output is in {self._log}"

    def _send(self, line: dict[str, Any] | None = None) -> None:
        """Write what the pipe takes now."""
        if line is not None:
            self._pending += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a child that is gone is found by its status
            while self._pending:
                self._pending = self._pending[os.write(self._in.fileno(), self._pending) :]

    def _hear(self) -> None:
        """Act on the child's lines so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out.fileno(), 2**16):
                self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        for line in map(json.loads, lines):
            if "failed" in line:
                self._kill(line["failed"])
            if "id" in line:
                self._ready_by = None
                self._keep(line["id"])
            if "say" in line:
                self._say(line["say"])

    def _kill(self, why: str) -> None:
        """End the child with all of its session, and raise RuntimeError."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close_pipes()
        raise RuntimeError(f"{why}; {self._where}")

    def _close_pipes(self) -> None:
        self._out.close()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()


def main() -> int:
    """The child: reads a run's description and its rows, and hands them to the tracker; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run saves and closes the tracker first
    rows, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # so that no package reads rows
    os.dup2(2, 1)  # so that none prints among the answers
    start = json.loads(rows.readline())
    sys.path[:] = start["path"]
    try:
        return _serve(start["name"], start["run"], rows, answers)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _answer(answers, {"failed": text})
        raise


def _serve(name: str, facts: dict[str, Any], rows: IO[str], answers: IO[str]) -> int:
    from elas.train.trackers import CLOSE_S, IN_A_PROCESS, TrackedRun

    def say(text: str) -> None:
        _answer(answers, {"say": f"{name}: {text}"})

    def warn(message: Warning | str, category: type[Warning], *_where: Any) -> None:
        print(f"{category.__name__}: {message}", file=sys.stderr)
        if category is UserWarning:  # such as that of rows which Trackio drops
            say(f"warning: {' '.join(str(message).split())[:300]}")

    warnings.showwarning = warn
    tracker = IN_A_PROCESS[name](TrackedRun(**facts), say)
    _answer(answers, {"id": tracker.id})
    for line in map(json.loads, rows):
        if "close" in line:
            tracker.close(line["close"])
            return 0
        tracker.log(line["step"], line["values"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(CLOSE_S))  # the parent, which would kill this process, is dead
    tracker.close(True)
    return 0


def _answer(answers: IO[str], line: dict[str, str]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the run has ended
        answers.write(json.dumps(line) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.exit(main())
