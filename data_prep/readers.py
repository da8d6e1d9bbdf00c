"""How each kind of file becomes documents: as a stream, a piece at a time, with every input that is no document named.

A piece `(begin, end)` of a file is what one task reads of it: a byte range of plain JSONL (a line belongs to the piece
it begins in), row groups of Parquet, a shard of a Hugging Face dataset. All else cannot be cut and is read whole.
Documents larger than `MAX_DOCUMENT` bytes are left out, so that a file without line ends cannot fill the memory.
"""

import csv
import gzip
import io
import json
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_DOCUMENT = 512_000_000
WHOLE = (0, -1)
"""The piece that is all of a file."""
# UTF-8 itself cannot hold half a surrogate pair; only a JSON escape, or a decoder told to pass bytes on, brings one in.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)

Skip = Callable[[str, int | None], None]
"""Called with a reason and the number of the line or row in the piece, from 1; None where the whole file is meant."""
Row = tuple[int, str]
"""Number of a line or row within the piece, from 1, and the document's text."""


def read_piece(path: str, kind: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    """The documents of a piece of a file.

    Args:
        path: the file, or `NAME[@REVISION][/CONFIG]:SPLIT` of a Hugging Face dataset.
        kind: `jsonl`, `csv`, `parquet`, `text` or `hf`.
        field: the key or column that holds the text; text files have none.
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


def parquet_row_groups(path: str) -> list[tuple[int, int]] | None:
    """Bytes and rows of every row group, None when it cannot be opened."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            return [(group.total_byte_size, group.num_rows) for group in groups]
    except (OSError, pyarrow.ArrowInvalid):
        return None


def open_dataset(name: str):
    """A streaming `datasets.IterableDataset` for `NAME[@REVISION][/…]:SPLIT`; see `elas.data_prep.sources`."""
    import datasets

    name, split = name.rsplit(":", 1)
    name, _, config = name.partition("#")
    name, _, revision = name.partition("@")
    datasets.disable_progress_bars()
    return datasets.load_dataset(name, config or None, split=split, streaming=True, revision=revision or None)


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
        if _SURROGATE_ESCAPE.search(line) and not _encodable(text):
            skip("half a surrogate pair", number)
        else:
            yield number, text


def _text_of(record: object, field: str, number: int, skip: Skip) -> str | None:
    """The text of a record; None, and told to `skip`, when it has none."""
    if not isinstance(record, dict):
        skip("not a record", number)
    elif field not in record:
        skip(f"no field {field!r}", number)
    elif not isinstance(record[field], str):
        skip(f"field {field!r} is no text", number)
    else:
        return record[field]
    return None


def _lines(path: str, piece: tuple[int, int], skip: Skip) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that begin in the piece; one that is too long is passed over, and told to `skip`."""
    begin, end = piece
    with _open(path) as file:
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


def _read_csv(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    csv.field_size_limit(MAX_DOCUMENT)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = "\t" if ".tsv" in Path(path).suffixes else ","
        rows = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            header = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            return skip(f"malformed CSV ({error})", 1)
        if field not in header:
            return skip(f"no column {field!r}", 1)
        column = header.index(field)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                skip(f"malformed CSV ({error})", rows.line_num)
                continue
            if not row:
                continue
            if len(row) != len(header):
                skip(f"wrong number of columns ({len(row)} instead of {len(header)})", rows.line_num)
            elif not _encodable(row[column]):
                skip("not UTF-8", rows.line_num)
            else:
                yield rows.line_num, row[column]


def _read_parquet(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                return skip(f"no column {field!r}", None)
            begin, end = piece
            groups = range(begin, file.metadata.num_row_groups if end < 0 else end)
            number = 0
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=[field]):
                for value in batch.column(0):
                    number += 1
                    # PyArrow decodes on demand, so that one bad value does not cost its neighbours.
                    text = _parquet_text(value, number, skip)
                    if text is not None:
                        yield number, text
    except pyarrow.ArrowException as error:
        skip(f"damaged Parquet ({str(error).splitlines()[0]})", None)


def _parquet_text(value, number: int, skip: Skip) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return skip("not UTF-8", number)
    if not isinstance(text, str):
        return skip("no text in the column", number)
    return text


def _read_text(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        return skip(f"larger than {MAX_DOCUMENT:,} bytes", None)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode(_encoding(path, data))
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return skip("not UTF-8", None)
    yield 1, text


def _read_hf(path: str, field: str, piece: tuple[int, int], skip: Skip) -> Iterator[Row]:
    dataset = open_dataset(path)
    begin, end = piece
    number = 0
    for shard in range(begin, dataset.num_shards if end < 0 else end):
        for record in dataset.shard(dataset.num_shards, shard):
            number += 1
            text = _text_of(record, field, number, skip)
            if text is not None and _encodable(text):
                yield number, text
            elif text is not None:
                skip("half a surrogate pair", number)


_READERS = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text, "hf": _read_hf}


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import pyarrow

        # It says when a file ends within a frame, and goes on after one; read by a thread of its own it is no faster.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return open(path, "rb", buffering=1 << 20)


def _encoding(path: str, data: bytes) -> str:
    """UTF-8, or what a Python source file declares for itself (PEP 263) when it is not UTF-8."""
    try:
        data.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.endswith(".py") else "utf-8"


def _encodable(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
