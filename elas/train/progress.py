"""Progress of slow operations on the console, so that a run is never silent for long.

A separate thread writes, since a single micro-batch may take minutes. On a terminal one line is rewritten every second;
elsewhere a line is added after some seconds of silence.
"""

import time

from elas.console import Console, Ticker, clock

FIRST_S, LATER_S = 8.0, 60.0
"""Longest silence without a terminal: `FIRST_S` until the first step ends and in validations, then `LATER_S`."""


class Progress(Ticker):
    """Shows the current operation; a context manager.

    Args:
        console: where to write.
        steps: total steps of the run.
        shows: False on all ranks but 0, where nothing is printed.
    """

    def __init__(self, console: Console, steps: int, shows: bool):
        super().__init__(shows=shows, every_s=1.0)
        self.console, self.steps = console, steps
        self.interval = FIRST_S
        self._what, self._of, self._number = "starting", 0, 0
        self._since = self._said = time.monotonic()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.shows:
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
        if self.shows:
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

    def tick(self) -> None:
        """Rewrite the line, or without a terminal add one after `interval` seconds of silence."""
        if self.console.is_terminal:
            self.console.live(self.text())
        elif time.monotonic() - max(self._said, self._since) >= self.interval:
            self.say(self.text())
