"""Readers for CSV and TSV that recover after malformed rows.

CSV follows RFC 4180: a quoted field may contain line breaks. A malformed row, or one whose quote is never closed, is
reported by its first line; reading resumes at the next line that parses to the right number of columns and is followed
by a line that may start another row. Lines within a broken record rarely do. TSV follows IANA's
text/tab-separated-values: a row is one line, and quotes are ordinary text.

A single task reads a whole table, so no piece starts within a record.
"""

import csv
import io
from collections import deque
from collections.abc import Iterator

from elas.data_prep import fields
from elas.data_prep.formats import open_text

_UNCLOSED = "a quote that is never closed"
_LOOKAHEAD_LINES = 100
"""Maximum lines of a row that is recognised as the next one after a malformed row."""


class TooLarge(Exception):
    """A record exceeds the maximum document size."""


def columns(path: str, kind: str) -> list[str] | None:
    """The column names in a table's header; None if it cannot be read."""
    try:
        with _text(path, kind) as file:
            rows = _Rows(file, kind, 1 << 20)
            return next(rows.parsed(), (0, None))[1]
    except (OSError, EOFError, csv.Error, ValueError, TooLarge):
        return None


def read_table(path: str, kind: str, field: str, skip, largest: int) -> Iterator[tuple[int, str]]:
    """Yield the texts of a table, each with the number of its row's first line, from 1.

    Args:
        path: the file.
        kind: `csv`, `tsv` or `tsv-quoted`.
        field: the column that holds the text.
        skip: called with a reason and the row's first line for every row that yields no document.
        largest: maximum bytes of a row.
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
    """Rows of a table with the numbers of their first lines; skips malformed rows and resumes after them."""

    def __init__(self, file: io.TextIOBase, kind: str, largest: int):
        self.delimiter = "," if kind == "csv" else "\t"
        self.quoted = kind != "tsv"
        self.largest = largest
        self.width: int | None = None
        self._file = file
        self._pushed_back: deque[str] = deque()  # lines to read again
        self._record: list[str] = []  # lines of the record being parsed
        self._record_chars = 0
        self._number = 0  # of the last line read

    def __iter__(self):
        return self

    def __next__(self) -> str:
        """The next line, for `csv.reader`."""
        line = self._next_line()
        if not line:
            raise StopIteration
        self._number += 1
        self._record.append(line)
        self._record_chars += len(line)
        if self._record_chars >= self.largest:
            if not line.endswith(("\n", "\r")):
                self._record[-1] = self._skip_rest_of_line()
            raise TooLarge
        return line

    def parsed(self, skip=None) -> Iterator[tuple[int, list[str]]]:
        """Yield first line numbers and rows; without `skip`, raises at the first malformed row."""
        reader = self._reader(self)
        while True:
            self._record, self._record_chars = [], 0
            first = self._number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, TooLarge) as error:
                if skip is None:
                    raise
                if isinstance(error, TooLarge) and len(self._record) == 1:
                    skip(f"larger than {self.largest:,} bytes", first)
                else:
                    skip(self._recover(error, first), first)
                if self.width is None:
                    return  # without a header the columns are unknown
                reader = self._reader(self)  # csv.reader is unusable after an error
                continue
            if row and (self.quoted or row != [""]):
                yield first, row

    def _reader(self, lines) -> Iterator[list[str]]:
        if not self.quoted:
            return (line.removesuffix("\n").removesuffix("\r").split("\t") for line in lines)
        return csv.reader(lines, strict=True, delimiter=self.delimiter)

    def _recover(self, error: Exception, first: int) -> str:
        """Push back all lines from the next one that starts a row; returns the reason for the skip."""
        why = str(error)
        if isinstance(error, TooLarge):
            why = f"{_UNCLOSED}, or a row larger than {self.largest:,} bytes"
        elif "unexpected end" in why:
            why = _UNCLOSED
        lines = self._record
        start = 1
        while self._has_line(lines, start) and not self._starts_row(lines, start):
            start += 1
        self._pushed_back.extendleft(reversed(lines[start:]))
        self._number = first + start - 1
        return f"malformed CSV ({why}{f', lines {first} to {self._number}' if start > 1 else ''})"

    def _starts_row(self, lines: list[str], start: int) -> bool:
        """Whether a row of the right width starts at a line and is followed by a line that may start another."""
        width = self.width or 1
        used = start

        def lookahead() -> Iterator[str]:
            nonlocal used
            while used < start + _LOOKAHEAD_LINES and self._has_line(lines, used):
                used += 1
                yield lines[used - 1]

        try:
            row = next(csv.reader(lookahead(), strict=True, delimiter=self.delimiter), [])
        except (csv.Error, TooLarge):
            return False
        if len(row) != width:
            return False
        return not self._has_line(lines, used) or lines[used].count(self.delimiter) >= width - 1

    def _has_line(self, lines: list[str], index: int) -> bool:
        """Whether line `index` exists; reads it into `lines` if it is the next one."""
        if index == len(lines) and (line := self._next_line()):
            lines.append(line)
        return index < len(lines)

    def _next_line(self) -> str:
        return self._pushed_back.popleft() if self._pushed_back else self._file.readline(self.largest)

    def _skip_rest_of_line(self) -> str:
        """Read to the end of an overlong line; returns a blank line to replace it."""
        while (part := self._file.readline(1 << 20)) and not part.endswith("\n"):
            pass
        return "\n"


def _text(path: str, kind: str) -> io.TextIOWrapper:
    return open_text(path, newline="\n" if kind == "tsv" else "")
