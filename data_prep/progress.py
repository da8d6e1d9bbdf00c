"""Progress of a tokenisation: one line on stderr, rewritten in place; nothing if stderr is not a terminal."""

import time

from elas.console import Console, clock


class Progress:
    """A context whose `show` updates the progress line, and which clears the line on exit.

    Args:
        total: bytes of the inputs on disk; for compressed inputs the remaining time is therefore underestimated.
    """

    def __init__(self, total: int):
        self.total = total
        self.start = time.perf_counter()
        self._console = Console("err")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._console.live("")

    def show(self, size: int, documents: int, tasks: int) -> None:
        """Show the bytes of text, documents and finished tasks so far."""
        seconds = time.perf_counter() - self.start
        line = f"{tasks:,} tasks done  {clock(seconds)}"
        if size:
            left = max(0.0, self.total - size) / (size / seconds)
            rate = f"{size / 1e6 / seconds:.1f} MB/s  {clock(left)} left"
            line = f"{size / 1e6:,.0f} MB  {documents:,} documents  {rate}"
        self._console.live(line)
