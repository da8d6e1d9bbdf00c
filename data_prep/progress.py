"""How far a tokenisation has come: one line on stderr, rewritten; nothing when that is not a terminal."""

import sys
import time


class Progress:
    """A context whose `show` tells where things stand, and which wipes its line at the end.

    Args:
        total: bytes of the inputs on disk; compressed ones are read as more, so the time left is then a guess.
    """

    def __init__(self, total: int):
        self.total = total
        self.start = time.perf_counter()
        self.shown = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.shown:
            print("\r" + " " * 90 + "\r", end="", file=sys.stderr, flush=True)

    def show(self, size: int, documents: int, tasks: int) -> None:
        """Bytes of text, documents and finished tasks so far."""
        if not sys.stderr.isatty():
            return
        self.shown = True
        seconds = time.perf_counter() - self.start
        line = f"{tasks:,} tasks done  {seconds:.0f} s"
        if size:
            left = max(0.0, self.total - size) / (size / seconds)
            line = f"{size / 1e6:,.0f} MB  {documents:,} documents  {size / 1e6 / seconds:.1f} MB/s  {_time(left)} left"
        print(f"\r{line:<90}", end="", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
