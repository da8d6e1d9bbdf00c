"""How far a tokenisation has come: one line on stderr, rewritten; nothing when that is not a terminal."""

import time

from elas.console import Console, clock


class Progress:
    """A context whose `show` says where things stand, and which wipes its line at the end.

    Args:
        total: bytes of the inputs on disk; compressed ones are read as more, so the time left is then a guess.
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
        """Bytes of text, documents and finished tasks so far."""
        seconds = time.perf_counter() - self.start
        line = f"{tasks:,} tasks done  {clock(seconds)}"
        if size:
            left = max(0.0, self.total - size) / (size / seconds)
            rate = f"{size / 1e6 / seconds:.1f} MB/s  {clock(left)} left"
            line = f"{size / 1e6:,.0f} MB  {documents:,} documents  {rate}"
        self._console.live(line)
