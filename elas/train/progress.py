"""Progress of slow operations on the console, so that a run is never silent for long.

A separate thread writes, since a single micro-batch may take minutes. On a terminal a block with the run's values is
rewritten every second (`elas.live`); elsewhere a line is added after some seconds of silence.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from elas.checkpoint.folder import age_s
from elas.console import Console, Screen, Ticker, clock
from elas.live import View, columns_of, render
from elas.train.lines import step_line, validation_line
from elas.train.standing import Standing

FIRST_S, LATER_S = 8.0, 60.0
"""Longest silence without a terminal: `FIRST_S` until the first step ends and in validations, then `LATER_S`."""


class Progress(Ticker):
    """Shows the current operation and the run's values; a context manager.

    Args:
        console: where to write.
        steps: total steps of the run.
        shows: False on all ranks but 0, where nothing is printed.
        standing: called to find out what of the run is saved; from any thread.
    """

    def __init__(self, console: Console, steps: int, shows: bool, standing: Callable[[], Standing] = Standing.at_start):
        super().__init__(shows=shows, every_s=1.0)
        self.console, self.steps = console, steps
        self.interval = FIRST_S
        self._view, self._standing = View(steps=steps), standing
        self._end = 0.0  # estimated end of the run, of time.monotonic; with `_view.left_s`
        self._what, self._of, self._number = "starting", 0, 0
        self._since = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.shows:
            self.console.block(self.lines)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.shows:
            self.console.block(None)

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

    def stepped(self, step: int, tokens: int, loss: float | None = None) -> None:
        """A step was taken, or the run resumes after it."""
        self._view = replace(self._view, step=step, tokens=tokens, loss=loss)

    def logged(self, row: dict, more_s: float) -> None:
        """Print the line of a logged step.

        Args:
            row: as in metrics.jsonl.
            more_s: seconds of the remaining validations and saves.
        """
        left_s = (self.steps - row["step"]) * row["step_s"] + more_s
        self._end = time.monotonic() + left_s
        self._view = replace(self._view, **columns_of(row), left_s=left_s)
        width = self.console.width if self.console.is_terminal else None
        self.say(step_line(row, self.steps, width, more_s=more_s))

    def validated(self, row: dict) -> None:
        """Print the line of a validation; `row` as in validation.jsonl."""
        self._view = replace(self._view, ppl=row["ppl"], valid_step=row["step"])
        self.say(validation_line(row))

    def lines(self, screen: Screen) -> list[str]:
        """The block."""
        view, saved = self._view, self._standing()
        if view.left_s is not None:
            view = replace(view, left_s=max(0.0, self._end - time.monotonic()))
        if saved.checkpoint is not None:
            view = replace(view, checkpoint=saved.step, checkpoint_age_s=age_s(saved.checkpoint))
        return render(replace(view, now=self.text()), screen)

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
        """Draw the block again, or where there is none add a line after `interval` seconds of silence."""
        if self.console.has_blocks:
            self.console.redraw()
        elif time.monotonic() - max(self._said, self._since) >= self.interval:
            self.say(self.text())
