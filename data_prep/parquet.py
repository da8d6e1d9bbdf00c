"""Parquet, with memory that goes by bytes: row groups one by one, in batches of at most `BATCH_BYTES`, page by page.

A page is the smallest thing that can be decompressed, and writers put about a thousand rows in one, so rows of
megabytes make pages of gigabytes: `needs` estimates what reading a file takes, so that it can be said beforehand.
"""

from collections.abc import Iterator

from elas.data_prep import fields

BATCH_BYTES, BATCH_ROWS = 8_000_000, 8
_STREAM = 1 << 16  # without it, PyArrow holds all of a row group's column compressed
_PAGE_ROWS, _PAGE_BYTES = 1024, 1_000_000
"""PyArrow and parquet-mr look whether a page is full after so many rows, against so many bytes."""


LARGE = 300_000_000
"""Bytes that a file may take of a worker's memory without a warning."""


def row_groups(path: str) -> list[tuple[int, int]] | None:
    """Bytes and rows of every row group, None when it cannot be opened."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            return [(group.total_byte_size, group.num_rows) for group in groups]
    except (OSError, pyarrow.ArrowException):
        return None


def columns(path: str) -> list[str] | None:
    """The columns of a file as `--field` takes them, nested ones with dots; None when it cannot be opened."""
    import pyarrow
    import pyarrow.parquet

    try:
        return _names(pyarrow.parquet.read_schema(path))
    except (OSError, pyarrow.ArrowException):
        return None


def needs(path: str, field: str) -> int:
    """About how many bytes reading takes at once: twice the largest page of the column, and a batch."""
    import pyarrow
    import pyarrow.parquet

    largest = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                chunk, rows = _chunk(file.metadata.row_group(group), field)
                if rows:
                    largest = max(largest, min(chunk, max(_PAGE_BYTES, _PAGE_ROWS * chunk // rows)))
    except (OSError, pyarrow.ArrowException):
        return 0
    return 2 * largest + BATCH_BYTES


def read(path: str, field: str, piece: tuple[int, int], skip) -> Iterator[tuple[int, str]]:
    """The texts in some row groups, each with the number of its row in the piece, from 1; see `readers.read_piece`."""
    import pyarrow
    import pyarrow.parquet

    begin, end = piece
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_STREAM) as file:
            there = _names(file.schema_arrow)
            path_in = _path(file.schema_arrow, field)
            if path_in is None:
                if begin == 0:  # said once a file, not once a piece
                    skip(fields.missing("column", field, there), None)
                return
            number = 0
            for group in range(begin, file.metadata.num_row_groups if end < 0 else end):
                chunk, rows = _chunk(file.metadata.row_group(group), field)
                size = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(chunk, 1)))
                # Threads would decode ahead; there is a worker a core.
                batches = file.iter_batches(size, row_groups=[group], columns=[field], use_threads=False)
                for batch in batches:
                    for value in _values(batch, path_in):
                        number += 1
                        # PyArrow decodes on demand, so that one bad value does not cost its neighbours.
                        text = _text(value, number, skip)
                        if text is not None:
                            yield number, text
    except pyarrow.ArrowException as error:
        skip(f"damaged Parquet ({str(error).splitlines()[0]})", None)


def _names(schema) -> list[str]:
    import pyarrow

    found = []
    for field in schema:
        if pyarrow.types.is_struct(field.type):
            found += [f"{field.name}.{inner}" for inner in _names(field.type)]
        else:
            found.append(field.name)
    return found


def _path(schema, field: str) -> list[str] | None:
    """A column's place in the schema: its name, or the names of the structs around it and its own; None if not there.

    Raises nothing: a struct itself is a place too, whose values are then no text.
    """
    import pyarrow

    if field in schema.names:
        return [field]
    first, dot, rest = field.partition(".")
    if not dot or first not in schema.names:
        return None
    found, kind = [first], schema.field(first).type
    for name in rest.split("."):
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        found, kind = [*found, name], kind.field(name).type
    return found


def _chunk(group, field: str) -> tuple[int, int]:
    """Bytes of a column in a row group, decompressed, and rows."""
    parts = [group.column(n) for n in range(group.num_columns)]
    mine = [p for p in parts if p.path_in_schema == field or p.path_in_schema.startswith(f"{field}.")]
    return sum(part.total_uncompressed_size for part in mine), group.num_rows


def _values(batch, path_in: list[str]):
    column = batch.column(0)
    if len(path_in) > 1:
        import pyarrow.compute

        column = pyarrow.compute.struct_field(column, path_in[1:])
    return column


def _text(value, number: int, skip) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return skip("not UTF-8", number)
    if not isinstance(text, str):
        return skip("no text in the column", number)
    return text
