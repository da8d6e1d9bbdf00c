"""Console output: permanent lines, a line or a block of lines rewritten in place, heartbeats, durations and tables.

A rewritten line is truncated to the terminal's current width: a longer one would wrap, and only its last row would be
overwritten. A block is drawn below an empty line, on which the cursor stays: what other processes print lands there and
is kept, and erasing from the cursor to the end of the screen removes the block, also after the terminal has wrapped its
lines anew. The cursor is never hidden, so a killed process leaves none hidden.
"""

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple, Self, TextIO

_WIPE = "\r\x1b[2K"
_WIPE_BELOW = "\r\x1b[J"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


def clock(seconds: float) -> str:
    """Format a duration: `0:48`, `12:05`, `3:04:00`, `8d 21:00:00`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Screen(NamedTuple):
    """The current terminal."""

    columns: int
    rows: int
    encoding: str


class Console:
    """Writes lines to a stream, from any thread; if the stream fails (closed terminal), later output is dropped.

    Args:
        stream: `out` or `err`, for `sys.stdout` or `sys.stderr`, looked up at each write.
    """

    _lock: ClassVar = threading.RLock()  # of all consoles: both streams are usually one terminal
    _shown: ClassVar["Console | None"] = None  # the one whose line or block is on the terminal

    def __init__(self, stream: str = "out"):
        self._name = f"std{stream}"
        self._live = ""
        self._block: Callable[[Screen], list[str]] | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be rewritten in place."""
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    @property
    def has_blocks(self) -> bool:
        """Whether `block` shows anything: a terminal that can move its cursor up."""
        return self.is_terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")

    @property
    def screen(self) -> Screen:
        """Size and encoding of the terminal; 80 × 24 if unknown."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError, AttributeError):
            columns, rows = 0, 0
        return Screen(columns or 80, rows or 24, getattr(self._stream, "encoding", None) or "utf-8")

    @property
    def width(self) -> int:
        """Current columns of the terminal; 80 if unknown."""
        return self.screen.columns

    def say(self, text: str) -> None:
        """Print a permanent line above the rewritten one or the block; on a terminal it is wrapped between words."""
        with self._lock:
            if self.is_terminal and len(text) > self.width:
                text = textwrap.fill(text, self.width - 1, subsequent_indent="  ", break_on_hyphens=False)
            shown = Console._shown if self.is_terminal else None
            if shown is not None:
                shown._erase()
            self._write(f"{text}\n")
            if shown is not None:
                shown._draw()

    def last(self, text: str) -> None:
        """Print the last line of a process that ends without leaving its contexts; a block is removed for good."""
        with self._lock:
            shown, Console._shown = Console._shown, None
            if shown is not None:
                shown._erase()
                shown._live, shown._block = "", None
            self.say(text)

    def live(self, text: str) -> None:
        """Rewrite the last line, or remove it if `text` is empty; does nothing without a terminal."""
        with self._lock:
            if not self.is_terminal:
                return
            text = text[: self.width - 1]
            if text or self._live:
                self._write(f"{_WIPE}{text}")
            self._live = text
            self._note_shown()

    def block(self, lines: Callable[[Screen], list[str]] | None) -> None:
        """Show a block of lines below all others until it is removed with None; only if `has_blocks`.

        Args:
            lines: called at each drawing, from any thread; returns lines that are narrower than the screen.
        """
        with self._lock:
            if self._block is not None:
                self._erase()
            self._block = lines if self.has_blocks else None
            self._note_shown()
            self.redraw()

    def redraw(self) -> None:
        """Draw the block with its current values, if it is shown."""
        with self._lock:
            if self._block is not None and self.is_terminal:
                self._draw()

    def clear_below(self) -> None:
        """Remove what a killed process of this terminal left below the cursor."""
        if self.has_blocks:
            self._write(f"{_WRAP}\x1b[J")

    def _note_shown(self) -> None:
        if self._live or self._block is not None:
            Console._shown = self
        elif Console._shown is self:
            Console._shown = None

    def _erase(self) -> None:
        self._write(_WIPE if self._block is None else _WIPE_BELOW)

    def _draw(self) -> None:
        """Write the rewritten line, or the block with the cursor back above it, in one piece."""
        if self._block is None:
            self._write(self._live)
            return
        screen = self.screen
        lines = self._block(screen)[: max(0, screen.rows - 2)]
        drawn = "".join(f"\n{line}\x1b[K" for line in lines)
        up = f"\x1b[{len(lines)}A" if lines else ""
        # Without wrapping, since the terminal may have become narrower since its size was read.
        self._write(f"\r\x1b[K{_NO_WRAP}{drawn}\x1b[J{_WRAP}{up}\r")

    @property
    def _stream(self) -> TextIO:
        return getattr(sys, self._name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            setattr(sys, self._name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends


def _forked() -> None:
    """In a forked child: the thread that may hold the lock, or draw the block, is not there."""
    Console._lock, Console._shown = threading.RLock(), None


os.register_at_fork(after_in_child=_forked)


class Ticker:
    """Calls `tick` from a thread of its own while entered, so that long operations in the main thread are not silent.

    Args:
        shows: False on all ranks but 0, where `tick` is never called.
        every_s: seconds between calls.
    """

    def __init__(self, *, shows: bool, every_s: float):
        self.shows, self._every_s = shows, every_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__.lower(), daemon=True)

    def __enter__(self) -> Self:
        if self.shows:
            self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._closed.set()
        if self.shows:
            self._thread.join()

    def tick(self) -> None:
        """Print what is due; called from the thread."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            self.tick()


class Heartbeat(Ticker):
    """Prints a line on standard error every 8 s while a program loads: `still starting (16 s)`; a context manager.

    An import that holds the GIL delays the line. Standard output is left to the program.

    Args:
        what: the current operation, for the line.
        shows: False on all ranks but 0, where nothing is printed.
        silence_s: longest silence in seconds.
    """

    def __init__(self, what: str, *, shows: bool = True, silence_s: float = 8.0):
        super().__init__(shows=shows, every_s=min(0.5, silence_s / 4))
        self._what, self._silence_s, self._console = what, silence_s, Console("err")
        self._since = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since this was created."""
        return time.monotonic() - self._since

    def begin(self, what: str) -> None:
        """Set the current operation; the caller must have printed it, so the silence starts now."""
        self._what, self._said = what, time.monotonic()

    def tick(self) -> None:
        """Print the line after `silence_s` without one."""
        if time.monotonic() - self._said >= self._silence_s:
            self._console.say(f"still {self._what} ({self.seconds:.0f} s)")
            self._said = time.monotonic()


def table(headers: list[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """Format a table: headers, a rule, and aligned columns.

    Args:
        headers: one per column.
        rows: cells as text.
        left: number of leading columns that are left-aligned; the others are right-aligned.
    """
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), "─" * (sum(widths) + 2 * len(widths) - 2), *(line(row) for row in rows)])


class LiveLine:
    """A line on stderr that is rewritten in place.

    Args:
        every_s: without a terminal, seconds after which the line is printed; None: never.
    """

    def __init__(self, every_s: float | None = None):
        self._console, self._every_s, self._said = Console("err"), every_s, time.monotonic()

    def __call__(self, text: str) -> None:
        """Rewrite the line."""
        if self._console.is_terminal:
            self._console.live(text)
        elif text and self._every_s is not None and time.monotonic() - self._said >= self._every_s:
            self._console.say(text)
            self._said = time.monotonic()

    def clear(self) -> None:
        """Remove the line."""
        self("")


def facts_table(rows: list[tuple[str, str]]) -> str:
    """Format names and values as two aligned columns between rules."""
    width = max(len(name) for name, _ in rows)
    rule = "─" * (width + 3 + max(len(value) for _, value in rows))
    return "\n".join([rule, *(f"{name:<{width}}   {value}" for name, value in rows), rule])
