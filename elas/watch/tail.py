"""Reads the rows that are appended to a JSONL file of a run, which another host may be writing or replacing."""

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

FIRST_BYTES = 1 << 20
"""Bytes at the end of a long file that are read at first."""
KEPT = 50


class Tail:
    """The last rows of a file; `read` takes what was appended since.

    A line counts once its newline is there: the last one may still be being written. A file that was replaced (a resume
    drops lines after its checkpoint) is read anew: it has another inode, is shorter, or the bytes that were read last
    are no longer where they were.

    Args:
        path: need not exist.

    Attributes:
        rows: the last ones, each with an integer `step` and a number as `loss`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.rows: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._inode, self._offset, self._mark = None, 0, b""

    def read(self) -> list[dict[str, Any]]:
        """The new rows; all that are read at first, or after the file was replaced.

        Raises:
            OSError: the file exists but cannot be read.
        """
        try:
            handle = self._path.open("rb")
        except FileNotFoundError:
            self._forget()
            return []
        with handle as file:
            facts = os.fstat(file.fileno())
            inode = (facts.st_dev, facts.st_ino)
            file.seek(self._offset - len(self._mark))
            if inode != self._inode or facts.st_size < self._offset or file.read(len(self._mark)) != self._mark:
                self._forget()
                self._inode = inode
                self._skip(file, facts.st_size - FIRST_BYTES)
            file.seek(self._offset)
            lines, newline, _ = file.read().rpartition(b"\n")
        if not newline:
            return []
        self._offset += len(lines) + 1
        self._mark = (self._mark + lines + newline)[-256:]
        new = [row for line in lines.split(b"\n") if (row := _row(line)) is not None]
        self.rows.extend(new)
        return new

    def _skip(self, file, to: int) -> None:
        """Begin at the first line after byte `to`."""
        if to > 0:
            file.seek(to)
            self._offset = to + len(file.readline())


def _row(line: bytes) -> dict[str, Any] | None:
    """A row; None for a line that is no row, as a kill or a disk that was full leave them."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = ("loss", "time")
    return row if all(isinstance(row.get(name), int | float) for name in numbers) else None
