"""Progress of slow operations on the console, so that a run is never silent for long.

A separate thread writes, since a single micro-batch may take minutes. On a terminal one line is rewritten every second;
elsewhere a line is added after some seconds of silence.
"""

import threading
import time

from elas.console import Console, clock

FIRST_S, LATER_S = 8.0, 60.0
"""Longest silence without a terminal: `FIRST_S` until the first step ends and in validations, then `LATER_S`."""


class Progress:
    """Shows the current operation; a context manager.

    Args:
        console: where to write.
        steps: total steps of the run.
        shows: False on all ranks but 0, where nothing is printed.
    """

    def __init__(self, console: Console, steps: int, shows: bool):
        self.console, self.steps, self._shows = console, steps, shows
        self.interval = FIRST_S
        self._what, self._of, self._number = "starting", 0, 0
        self._since = self._said = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._shows:
            self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._closed.set()
        if self._shows:
            self._thread.join()
            self.console.live("")

    def begin(self, what: str, micro_batches: int = 0) -> None:
        """An operation `what` begins, with this many micro-batches (0: it has none)."""
        self._since = time.monotonic()
        self._what, self._of, self._number = what, micro_batches, 0

    def at(self, number: int) -> None:
        """Micro-batch `number`, counted from 1, begins."""
        self._number = number

    def say(self, text: str) -> None:
        """Print a permanent line; on rank 0 only."""
        if self._shows:
            self._said = time.monotonic()
            self.console.say(text)

    def text(self) -> str:
        """The current operation, and its estimated duration once known."""
        what, of, number, passed = self._what, self._of, self._number, time.monotonic() - self._since
        if not of:
            return f"{what}, for {clock(passed)}"
        line = f"{what}: micro-batch {max(1, number)} of {of}"
        if number < 2:
            return f"{line}, for {clock(passed)}"
        whole = passed / (number - 1) * of
        line += f", {clock(max(0.0, whole - passed))} left of {clock(whole)}"
        if what.startswith("step "):
            left = self.steps - int(what.removeprefix("step ")) + 1
            line += f"; {left:,} such steps take {clock(whole * left)}" if left > 1 else ""
        return line

    def _run(self) -> None:
        while not self._closed.wait(1.0):
            if self.console.is_terminal:
                self.console.live(self.text())
            elif time.monotonic() - max(self._said, self._since) >= self.interval:
                self.say(self.text())
