"""CSV and TSV as their users write them.

CSV goes by RFC 4180: a field in quotes may hold line ends. Where a row is malformed, or its quote is never closed, the
row is named by its first line, and reading goes on at the next line that begins a row: one that parses to the right
number of columns and is followed by a line that may. Lines of a broken record seldom do. TSV goes by IANA's
text/tab-separated-values: a row is a line, and quotes are text.

A table is read by one task from end to end, so no piece begins within a record.
"""

import csv
import io
from collections import deque
from collections.abc import Iterator

from elas.data_prep import fields
from elas.data_prep.formats import open_data

_UNCLOSED = "a quote that is never closed"
_LOOKED_AT = 100
"""Lines that a row may have to be recognised as one after a malformed row."""


class TooLarge(Exception):
    """A record is larger than a document may be."""


def columns(path: str, kind: str) -> list[str] | None:
    """The header of a table; None where there is none that can be read."""
    try:
        with _text(path, kind) as file:
            rows = _Rows(file, kind, 1 << 20)
            return next(rows.parsed(), (0, None))[1]
    except (OSError, EOFError, csv.Error, ValueError, TooLarge):
        return None


def read_table(path: str, kind: str, field: str, skip, largest: int) -> Iterator[tuple[int, str]]:
    """The texts of a `csv`, `tsv` or `tsv-quoted` file, each with the first line of its row, from 1.

    Args:
        path: the file.
        kind: see above.
        field: the column that holds the text.
        skip: called with a reason and a row's first line for every row that is no document.
        largest: bytes that a row may have.
    """
    csv.field_size_limit(largest)
    with _text(path, kind) as file:
        rows = _Rows(file, kind, largest)
        header = None
        for number, row in rows.parsed(skip):
            if header is None:
                header = row
                rows.width = len(header)
                if not all(map(fields.encodable, header)):
                    return skip("not UTF-8", number)
                if field not in header:
                    return skip(fields.missing("column", field, header), number)
                column = header.index(field)
            elif len(row) != len(header):
                skip(f"wrong number of columns ({len(row)} instead of {len(header)})", number)
            elif not fields.encodable(row[column]):
                skip("not UTF-8", number)
            else:
                yield number, row[column]


class _Rows:
    """Rows of a table, with their first lines; malformed ones are skipped, and reading goes on after them."""

    def __init__(self, file: io.TextIOBase, kind: str, largest: int):
        self.delimiter = "," if kind == "csv" else "\t"
        self.quoted = kind != "tsv"
        self.largest = largest
        self.width: int | None = None
        self._file = file
        self._back: deque[str] = deque()  # lines that were taken and given back
        self._taken: list[str] = []  # lines of the record that is being parsed
        self._held = 0
        self._number = 0  # of the last line taken

    def __iter__(self):
        return self

    def __next__(self) -> str:
        """The next line, for `csv.reader`."""
        line = self._next_line()
        if not line:
            raise StopIteration
        self._number += 1
        self._taken.append(line)
        self._held += len(line)
        if self._held >= self.largest:
            if not line.endswith(("\n", "\r")):
                self._taken[-1] = self._pass_over_rest()
            raise TooLarge
        return line

    def parsed(self, skip=None) -> Iterator[tuple[int, list[str]]]:
        """Numbers of first lines, and rows; without `skip` the first mistake is raised."""
        reader = self._reader(self)
        while True:
            self._taken, self._held = [], 0
            first = self._number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, TooLarge) as error:
                if skip is None:
                    raise
                if isinstance(error, TooLarge) and len(self._taken) == 1:
                    skip(f"larger than {self.largest:,} bytes", first)
                else:
                    skip(self._recover(error, first), first)
                if self.width is None:
                    return  # without a header rows mean nothing
                reader = self._reader(self)
                continue
            if row and (self.quoted or row != [""]):
                yield first, row

    def _reader(self, lines) -> Iterator[list[str]]:
        if not self.quoted:
            return (line.removesuffix("\n").removesuffix("\r").split("\t") for line in lines)
        return csv.reader(lines, strict=True, delimiter=self.delimiter)

    def _recover(self, error: Exception, first: int) -> str:
        """Give back all lines from the next that begins a row; returns the reason."""
        why = str(error)
        if isinstance(error, TooLarge):
            why = f"{_UNCLOSED}, or a row larger than {self.largest:,} bytes"
        elif "unexpected end" in why:
            why = _UNCLOSED
        lines = self._taken
        start = 1
        while self._is_there(lines, start) and not self._begins_row(lines, start):
            start += 1
        self._back.extendleft(reversed(lines[start:]))
        self._number = first + start - 1
        return f"malformed CSV ({why}{f', lines {first} to {self._number}' if start > 1 else ''})"

    def _begins_row(self, lines: list[str], start: int) -> bool:
        """Whether a row of the right width begins at a line, and after it a line that may begin another."""
        width = self.width or 1
        used = start

        def some() -> Iterator[str]:
            nonlocal used
            while used < start + _LOOKED_AT and self._is_there(lines, used):
                used += 1
                yield lines[used - 1]

        try:
            row = next(csv.reader(some(), strict=True, delimiter=self.delimiter), [])
        except (csv.Error, TooLarge):
            return False
        if len(row) != width:
            return False
        return not self._is_there(lines, used) or lines[used].count(self.delimiter) >= width - 1

    def _is_there(self, lines: list[str], index: int) -> bool:
        """Whether there is a line, read into `lines` where it has not been yet."""
        if index == len(lines) and (line := self._next_line()):
            lines.append(line)
        return index < len(lines)

    def _next_line(self) -> str:
        return self._back.popleft() if self._back else self._file.readline(self.largest)

    def _pass_over_rest(self) -> str:
        """Read to the end of a line that is too long; returns a blank line in its place."""
        while (part := self._file.readline(1 << 20)) and not part.endswith("\n"):
            pass
        return "\n"


def _text(path: str, kind: str) -> io.TextIOWrapper:
    newline = "\n" if kind == "tsv" else ""
    return io.TextIOWrapper(open_data(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)
