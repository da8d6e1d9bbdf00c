"""A terminal that tests write to and look at: a pty as standard output and error, and what pyte makes of its bytes."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import sys
import termios
import threading
from collections.abc import Callable
from time import monotonic

import pyte


class Terminal:
    """A context in which `sys.stdout` and `sys.stderr` are a terminal of this size.

    Attributes:
        bytes: all that was written.
    """

    def __init__(self, columns: int, rows: int = 24):
        self.bytes = b""
        self._lock, self._open = threading.Lock(), True
        self._new(columns, rows)

    def _new(self, columns: int, rows: int) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self._screen)

    def __enter__(self) -> "Terminal":
        self._ours, theirs = pty.openpty()
        self._before = sys.stdout, sys.stderr
        self._theirs = os.fdopen(theirs, "w", encoding="utf-8")
        sys.stdout = sys.stderr = self._theirs
        self._set_size()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_error) -> None:
        sys.stdout, sys.stderr = self._before
        with contextlib.suppress(OSError):
            self._theirs.close()
        self.close()

    def close(self) -> None:
        """Close the window; what is written after that fails."""
        if self._open:
            self._open = False
            self._reader.join()
            os.close(self._ours)

    def lines(self) -> list[str]:
        """What scrolled out and what is on the screen, without the empty rows below."""
        self._settle()
        above = ["".join(row[x].data for x in range(self._screen.columns)) for row in self._screen.history.top]
        return _trimmed([*above, *self._screen.display])

    def below(self) -> list[str]:
        """The rows from the cursor's on."""
        self._settle()
        return _trimmed(self._screen.display[self._screen.cursor.y :])

    def wait_for(self, is_there: Callable[[], bool], seconds: float = 30.0) -> None:
        """Return when `is_there`; fails with what is on the screen."""
        end = monotonic() + seconds
        while not is_there():
            assert monotonic() < end, "\n".join(self.lines())

    @property
    def cursor_is_visible(self) -> bool:
        self._settle()
        return not self._screen.cursor.hidden

    @property
    def wraps(self) -> bool:
        self._settle()
        return pyte.modes.DECAWM in self._screen.mode

    def resize(self, columns: int, *, reflows: bool) -> None:
        """Change the width as xterm does, which cuts lines, or as most others do, which wrap them anew."""
        self._settle()
        with self._lock:
            rows, cursor = self._screen.lines, self._screen.cursor.y
            if not reflows:
                self._screen.resize(rows, columns)
            else:
                old = [line.rstrip() for line in self._screen.display]
                self._new(columns, rows)
                self._stream.feed("\r\n".join(old[:cursor]).encode() + b"\r\n" * bool(cursor))
                at = self._screen.cursor.y
                self._stream.feed("\r\n".join(_trimmed(old[cursor:])).encode() + f"\x1b[{at + 1};1H".encode())
            self._set_size()

    def _set_size(self) -> None:
        size = struct.pack("HHHH", self._screen.lines, self._screen.columns, 0, 0)
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        while self._open:
            with self._lock:
                self._take(0.02)

    def _settle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._theirs.flush()
        with self._lock:
            while self._open and self._take(0.1):
                pass

    def _take(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            read = os.read(self._ours, 65536)
        except OSError:  # nothing holds the other end
            self._open = False
            return False
        self.bytes += read
        self._stream.feed(read)
        return True


def _trimmed(lines: list[str]) -> list[str]:
    lines = [line.rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines
