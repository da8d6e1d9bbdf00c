"""Read documents from each kind of file as a stream, one piece at a time; every input without a document is reported.

A piece `(begin, end)` is the part of a file that one task reads: a byte range of plain JSONL (a line belongs to the
piece it starts in), row groups of Parquet, a shard of a Hugging Face dataset. Other files are read whole. Documents
larger than `MAX_DOCUMENT` bytes are skipped, so a file without line ends does not fill the memory.
"""

import gzip
import io
import json
import lzma
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator

from elas.data_prep import delimited, fields, hub, parquet
from elas.data_prep.formats import open_data, open_text

MAX_DOCUMENT = 512_000_000
WHOLE = (0, -1)
"""The piece that covers a whole file."""
# UTF-8 cannot encode a lone surrogate; it can only come from a JSON escape, or from decoding with `surrogateescape`.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_SEPARATORS = re.compile(r"[ \t\r\n,]*")
_CHUNK = 1 << 16

Skip = Callable[[str, int | None], None]
"""Called with a reason and the number of the line or row in the piece, from 1; None for the whole file."""
Row = tuple[int, str]
"""Number of a line or row within the piece, from 1, and the document's text."""


def read_piece(path: str, kind: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    """Yield the documents of a piece of a file.

    Args:
        path: the file, or `NAME[@REVISION][#CONFIG]:SPLIT` of a Hugging Face dataset.
        kind: one of `formats.FORMATS`, or `hf`.
        field: key or column of the text, `meta.text` if nested; ignored for text files.
        piece: the part to read; `WHOLE` for all of it.
        skip: called for every input that yields no document; reading continues after it where possible.
    """
    last, skipped = None, 0

    def count_and_skip(reason: str, number: int | None) -> None:
        nonlocal skipped
        skipped += 1
        skip(reason, number)

    try:
        for row in _READERS[kind](path, field, piece, count_and_skip):
            last = row[0]
            yield row
        if piece == WHOLE and last is None and not skipped:
            skip("holds no document", None)
    except _DAMAGED as error:
        skip(f"damaged or truncated from here on ({error or type(error).__name__})", last)
    except OSError as error:
        skip(f"unreadable{' from here on' if last else ''} ({error.strerror or error})", last)


def columns(path: str, kind: str) -> list[str] | None:
    """The columns of a table or dataset; None for other kinds, or if unknown before reading."""
    if kind in ("csv", "tsv", "tsv-quoted"):
        return delimited.columns(path, kind)
    if kind == "parquet":
        return parquet.columns(path)
    return hub.columns(path) if kind == "hf" else None


def _read_jsonl(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    for number, line in _lines(path, piece, skip):
        if number == 1 and piece[0] == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue  # blank lines hold no document
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            skip("not UTF-8", number)
            continue
        except (ValueError, RecursionError):
            skip("malformed JSON", number)
            continue
        text = _text_of(record, field, number, skip)
        if text is None:
            continue
        if _SURROGATE_ESCAPE.search(line) and not fields.encodable(text):
            skip("lone surrogate", number)
        else:
            yield number, text


def _text_of(record: object, field: str, number: int, skip: Skip) -> str | None:
    """The text of a record; calls `skip` and returns None if it has none."""
    if not isinstance(record, dict):
        return skip("not a record", number)
    has_field, text = fields.find(record, field)
    if not has_field:
        return skip(fields.missing("field", field, fields.names(record)), number)
    if not isinstance(text, str):
        return skip(f"field {field!r} is not text", number)
    return text


def _lines(path: str, piece: tuple[int, int], skip: Skip) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines that start in the piece; calls `skip` for lines that are too long."""
    begin, end = piece
    with open_data(path) as file:
        position = begin
        if begin:  # one byte earlier: if that is a line end, the piece starts with a whole line
            file.seek(begin - 1)
            position += sum(len(part) for part in _rest_of_line(file)) - 1
        number = 0
        while end < 0 or position < end:
            line = file.readline(MAX_DOCUMENT)
            if not line:
                return
            number += 1
            position += len(line)
            if len(line) == MAX_DOCUMENT and not line.endswith(b"\n"):
                position += sum(len(part) for part in _rest_of_line(file))
                skip(f"larger than {MAX_DOCUMENT:,} bytes", number)
                continue
            yield number, line


def _rest_of_line(file) -> Iterator[bytes]:
    while part := file.readline(1 << 20):
        yield part
        if part.endswith(b"\n"):
            return


def _read_json(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    """Yield the records of an array, or of objects that span many lines, numbered from 1."""
    for number, record in enumerate(_values(path), 1):
        if isinstance(record, ValueError):
            return skip(f"malformed JSON from here on ({record})", number)
        text = _text_of(record, field, number, skip)
        if text is not None and fields.encodable(text):
            yield number, text
        elif text is not None:
            skip("not UTF-8, or a lone surrogate", number)


def _values(path: str) -> Iterator[object]:
    """Yield the elements of a JSON array, or consecutive values, as a stream; a final `ValueError` on bad syntax."""
    decoder = json.JSONDecoder()
    with open_text(path, newline="") as file:
        buffer = file.read(_CHUNK).lstrip()
        is_array = buffer.startswith("[")
        position, step, ended = int(is_array), _CHUNK, False
        while True:
            separators = _SEPARATORS.match(buffer, position)
            assert separators  # the pattern also matches nothing
            position = separators.end()
            if is_array and buffer.startswith("]", position):
                return
            if ended and position == len(buffer):
                if is_array:
                    yield ValueError("the array is not closed")
                return
            value, end, why, is_final = _value(decoder, buffer, position)
            if not why and (ended or end < len(buffer)):  # a number at the buffer's end may continue after it
                yield value
                position, step = end, _CHUNK
                continue
            if ended or is_final or len(buffer) - position > MAX_DOCUMENT:
                yield ValueError(why)
                return
            more = file.read(step)
            ended = not more
            buffer, position, step = buffer[position:] + more, 0, 2 * step  # doubled, or long records take O(n²)


def _value(decoder: json.JSONDecoder, text: str, begin: int) -> tuple[object, int, str, bool]:
    """The value at `begin`, its end, why there is none, and whether more text cannot change that."""
    try:
        return *decoder.raw_decode(text, begin), "", False
    except json.JSONDecodeError as error:
        return None, begin, error.msg, error.pos < len(text) - 16 and not error.msg.startswith("Unterminated")
    except RecursionError:
        return None, begin, "nested too deeply", True


def _read_text(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    with open_data(path) as file:
        data = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        return skip(f"larger than {MAX_DOCUMENT:,} bytes", None)
    if b"\0" in data[:8192]:
        return skip("not UTF-8 text (it contains NUL bytes)", None)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode(_encoding(path, data))
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return skip("not UTF-8", None)
    yield 1, text


def _read_table(kind: str):
    def read(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
        return delimited.read_table(path, kind, field, skip, MAX_DOCUMENT)

    return read


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    **{kind: _read_table(kind) for kind in ("csv", "tsv", "tsv-quoted")},
    "parquet": parquet.read,
    "text": _read_text,
    "hf": hub.read,
}


def _encoding(path: str, data: bytes) -> str:
    """UTF-8, or the declared encoding (PEP 263) of a Python source file that is not UTF-8."""
    try:
        data.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.lower().endswith(".py") else "utf-8"
