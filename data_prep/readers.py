"""How each kind of file becomes documents: as a stream, a piece at a time, with every input that is no document named.

A piece `(begin, end)` of a file is what one task reads of it: a byte range of plain JSONL (a line belongs to the piece
it begins in), row groups of Parquet, a shard of a Hugging Face dataset. All else cannot be cut and is read whole.
Documents larger than `MAX_DOCUMENT` bytes are left out, so that a file without line ends cannot fill the memory.
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
from elas.data_prep.formats import open_data

MAX_DOCUMENT = 512_000_000
WHOLE = (0, -1)
"""The piece that is all of a file."""
# UTF-8 itself cannot hold half a surrogate pair; only a JSON escape, or a decoder told to pass bytes on, brings one in.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_SEPARATORS = re.compile(r"[ \t\r\n,]*")
_CHUNK = 1 << 16

Skip = Callable[[str, int | None], None]
"""Called with a reason and the number of the line or row in the piece, from 1; None where the whole file is meant."""
Row = tuple[int, str]
"""Number of a line or row within the piece, from 1, and the document's text."""


def read_piece(path: str, kind: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    """The documents of a piece of a file.

    Args:
        path: the file, or `NAME[@REVISION][#CONFIG]:SPLIT` of a Hugging Face dataset.
        kind: one of `formats.FORMATS`, or `hf`.
        field: the key or column that holds the text, `meta.text` for a nested one; text files have none.
        piece: which part of it, see above; `WHOLE` for all.
        skip: told of every input that is no document; what follows it is still read where that is possible.
    """
    last, told = None, 0

    def tell(reason: str, number: int | None) -> None:
        nonlocal told
        told += 1
        skip(reason, number)

    try:
        for row in _READERS[kind](path, field, piece, tell):
            last = row[0]
            yield row
        if piece == WHOLE and last is None and not told:
            skip("holds no document", None)
    except _DAMAGED as error:
        skip(f"damaged or cut short from here on ({error or type(error).__name__})", last)
    except OSError as error:
        skip(f"unreadable{' from here on' if last else ''} ({error.strerror or error})", last)


def columns(path: str, kind: str) -> list[str] | None:
    """The columns of a table or dataset; None where it is none, or they are not known before it is read."""
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
            skip("half a surrogate pair", number)
        else:
            yield number, text


def _text_of(record: object, field: str, number: int, skip: Skip) -> str | None:
    """The text of a record; None, and told to `skip`, when it has none."""
    if not isinstance(record, dict):
        return skip("not a record", number)
    there, text = fields.find(record, field)
    if not there:
        return skip(fields.missing("field", field, fields.names(record)), number)
    if not isinstance(text, str):
        return skip(f"field {field!r} is no text", number)
    return text


def _lines(path: str, piece: tuple[int, int], skip: Skip) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that begin in the piece; one that is too long is passed over, and told to `skip`."""
    begin, end = piece
    with open_data(path) as file:
        position = begin
        if begin:
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
    """The records of an array, or one or several objects laid out over many lines, numbered from 1."""
    for number, record in enumerate(_values(path), 1):
        if isinstance(record, ValueError):
            return skip(f"malformed JSON from here on ({record})", number)
        text = _text_of(record, field, number, skip)
        if text is not None and fields.encodable(text):
            yield number, text
        elif text is not None:
            skip("not UTF-8, or half a surrogate pair", number)


def _values(path: str) -> Iterator[object]:
    """The elements of a JSON array, or values one after another, as a stream; a `ValueError` where it goes wrong."""
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(open_data(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        held = file.read(_CHUNK).lstrip()
        is_array = held.startswith("[")
        position, step, ended = int(is_array), _CHUNK, False
        while True:
            position = _SEPARATORS.match(held, position).end()
            if is_array and held.startswith("]", position):
                return
            if ended and position == len(held):
                if is_array:
                    yield ValueError("the array has no end")
                return
            value, end, why, is_final = _value(decoder, held, position)
            if not why and (ended or end < len(held)):  # at the end of what is held a number may go on
                yield value
                position, step = end, _CHUNK
                continue
            if ended or is_final or len(held) - position > MAX_DOCUMENT:
                yield ValueError(why)
                return
            more = file.read(step)
            ended = not more
            held, position, step = held[position:] + more, 0, 2 * step  # twice, or long records take square time


def _value(decoder: json.JSONDecoder, text: str, begin: int) -> tuple[object, int, str, bool]:
    """The value at a place, its end, else why there is none, and whether more text could not change that."""
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
        return skip("not UTF-8 text (it has NUL bytes)", None)
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
    """UTF-8, or what a Python source file declares for itself (PEP 263) when it is not UTF-8."""
    try:
        data.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.lower().endswith(".py") else "utf-8"
