"""What people see while something runs: lines that stay, one that is rewritten in place, and one way to write times.

A rewritten line is cut to the terminal's width as it is at that moment: a longer one would wrap, and the next would
leave its first half behind.
"""

import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from typing import TextIO

_WIPE = "\r\x1b[2K"


def clock(seconds: float) -> str:
    """A duration: `0:48`, `12:05`, `3:04:00`, `8d 21:00:00`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Console:
    """Lines on a stream, from any thread. One that is gone, as a closed terminal is, takes nothing from then on.

    Args:
        stream: `out` or `err`: standard output or error as they are when a line is written.
    """

    def __init__(self, stream: str = "out"):
        self._name = f"std{stream}"
        self._lock = threading.RLock()
        self._live = ""

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be rewritten in place."""
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    @property
    def width(self) -> int:
        """Columns of the terminal now; 80 where it does not say."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):
            return 80

    def say(self, text: str) -> None:
        """A line that stays, above the one that is rewritten; broken between words where a terminal would break it."""
        with self._lock:
            if self.is_terminal and len(text) > self.width:
                text = textwrap.fill(text, self.width - 1, subsequent_indent="  ", break_on_hyphens=False)
            if self._live:
                self._write(f"{_WIPE}{text}\n{self._live}")
            else:
                self._write(f"{text}\n")

    def live(self, text: str) -> None:
        """Rewrite the last line; nothing where the stream is no terminal. Empty takes the line away."""
        with self._lock:
            if not self.is_terminal:
                return
            text = text[: self.width - 1]
            if text or self._live:
                self._write(f"{_WIPE}{text}")
            self._live = text

    @property
    def _stream(self) -> TextIO:
        return getattr(sys, self._name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            setattr(sys, self._name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends


class Heartbeat:
    """A line on standard error every eight seconds while a program loads: `still starting (16 s)`; a context.

    Standard output belongs to what the program prints. A thread of its own writes, as imports take long on a busy
    machine or a slow file system; one that holds the GIL throughout delays its line.

    Args:
        what: goes on, for the line.
        shows: False on all ranks but 0.
        every_s: seconds without a line, at most.
    """

    def __init__(self, what: str, *, shows: bool = True, every_s: float = 8.0):
        self._what, self._shows, self._every_s = what, shows, every_s
        self._console, self._closed = Console("err"), threading.Event()
        self._since = self._said = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._shows:
            self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._closed.set()
        if self._shows:
            self._thread.join()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._since

    def begin(self, what: str) -> None:
        """Something else goes on from now; the caller has just said so."""
        self._what, self._said = what, time.monotonic()

    def _run(self) -> None:
        while not self._closed.wait(max(0.0, self._said + self._every_s - time.monotonic())):
            if time.monotonic() - self._said >= self._every_s:
                self._console.say(f"still {self._what} ({self.seconds:.0f} s)")
                self._said = time.monotonic()


def table(headers: list[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """Aligned columns under a rule.

    Args:
        headers: one a column.
        rows: cells, as text.
        left: columns, from the first, that are text and stand left; numbers stand right.
    """
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), "─" * (sum(widths) + 2 * len(widths) - 2), *(line(row) for row in rows)])


class LiveLine:
    """One line on stderr, rewritten in place; nothing when stderr is not a terminal."""

    def __init__(self):
        self._console = Console("err")

    def __call__(self, text: str) -> None:
        """Say what runs now."""
        self._console.live(text)

    def clear(self) -> None:
        """Take the line away."""
        self("")


def facts_table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns between rules."""
    width = max(len(name) for name, _ in rows)
    rule = "─" * (width + 3 + max(len(value) for _, value in rows))
    return "\n".join([rule, *(f"{name:<{width}}   {value}" for name, value in rows), rule])
