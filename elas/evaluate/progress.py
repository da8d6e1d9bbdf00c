"""Progress of an evaluation: a rewritten line on a terminal, else a line every few seconds, on standard error."""

import time

from elas.console import Console, Ticker, clock


class Progress(Ticker):
    """A context whose `done` takes the tokens predicted so far on this rank's share.

    Args:
        total: tokens of this rank's share.
        shows: False on all ranks but 0.
    """

    _EVERY_S = 8.0

    def __init__(self, total: int, *, shows: bool):
        super().__init__(shows=shows, every_s=0.5)
        self._total, self._done, self._loss = total, 0, float("nan")
        self._console = Console("err")
        self._since = self._said = time.monotonic()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._console.live("")

    def done(self, tokens: int, loss: float) -> None:
        """Set the tokens predicted so far, and their mean loss (NaN if another rank has it)."""
        self._done, self._loss = tokens, loss

    def tick(self) -> None:
        """Show the line, or print it after some seconds without one."""
        if self._console.is_terminal:
            self._console.live(self._line())
        elif time.monotonic() - self._said >= self._EVERY_S:
            self._console.say(self._line())
            self._said = time.monotonic()

    def _line(self) -> str:
        seconds = time.monotonic() - self._since
        if not self._done:
            return f"evaluating: first batch ({seconds:.0f} s)"
        loss = "" if self._loss != self._loss else f"  loss {self._loss:.4f}"
        left = clock(seconds * (self._total - self._done) / self._done)
        return f"evaluating: {self._done / self._total:.0%}{loss}  {self._done / seconds:,.0f} tokens/s  {left} left"
