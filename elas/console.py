"""What people see while something runs: lines that stay, one that is rewritten in place, and one way to write times.

A rewritten line is cut to the terminal's width as it is at that moment: a longer one would wrap, and the next would
leave its first half behind.
"""

import os
import sys
import textwrap
import threading
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
