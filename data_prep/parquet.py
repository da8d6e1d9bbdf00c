"""Read Parquet with bounded memory: one row group at a time, in batches of at most `BATCH_BYTES`.

A page must be decompressed as a whole, and writers put about a thousand rows into one, so rows of megabytes make pages
of gigabytes. `required_memory` estimates the memory for a file, so that a warning can precede the work.
"""

from collections.abc import Iterator

from elas.data_prep import fields

BATCH_BYTES, BATCH_ROWS = 8_000_000, 8
_STREAM = 1 << 16  # without a buffer size, PyArrow holds a row group's whole compressed column
_PAGE_ROWS, _PAGE_BYTES = 1024, 1_000_000
"""PyArrow and parquet-mr check every this many rows whether a page has reached this many bytes."""


LARGE = 300_000_000
"""Bytes of worker memory for a file above which there is a warning."""


def row_groups(path: str) -> list[tuple[int, int]] | None:
    """`(bytes, rows)` of every row group, uncompressed; None if the file cannot be opened."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            return [(group.total_byte_size, group.num_rows) for group in groups]
    except (OSError, pyarrow.ArrowException):
        return None


def columns(path: str) -> list[str] | None:
    """The columns of a file in the form `--field` accepts, nested ones with dots; None if it cannot be opened."""
    import pyarrow
    import pyarrow.parquet

    try:
        return _names(pyarrow.parquet.read_schema(path))
    except (OSError, pyarrow.ArrowException):
        return None


def required_memory(path: str, field: str) -> int:
    """Estimated bytes of memory to read a file: twice the largest page of the column, plus a batch."""
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
    """Yield the texts in some row groups with their row numbers in the piece, from 1; see `readers.read_piece`."""
    import pyarrow
    import pyarrow.parquet

    begin, end = piece
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_STREAM) as file:
            path_in = _path(file.schema_arrow, field)
            if path_in is None:
                if begin == 0:  # report once per file, not once per piece
                    skip(fields.missing("column", field, _names(file.schema_arrow)), None)
                return
            number = 0
            for group in range(begin, file.metadata.num_row_groups if end < 0 else end):
                chunk, rows = _chunk(file.metadata.row_group(group), field)
                size = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(chunk, 1)))
                # No threads: they would decode ahead, and there already is one worker per core.
                batches = file.iter_batches(size, row_groups=[group], columns=[field], use_threads=False)
                for batch in batches:
                    for value in _values(batch, path_in):
                        number += 1
                        # PyArrow decodes each value on demand, so one bad value does not lose its neighbours.
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
    """A column's path in the schema: the names of its enclosing structs, then its own; None if it does not exist.

    The path may lead to a struct, whose values are then skipped as not text.
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
    """Uncompressed bytes of a column in a row group, and its rows."""
    parts = [group.column(n) for n in range(group.num_columns)]
    mine = [p for p in parts if p.path_in_schema == field or p.path_in_schema.startswith(f"{field}.")]
    return sum(part.total_uncompressed_size for part in mine), group.num_rows


def _values(batch, path_in: list[str]):
    column = batch.column(0)
    if len(path_in) > 1:
        import pyarrow.compute

        # pyarrow makes this function when it is imported, so its stubs lack it.
        column = pyarrow.compute.struct_field(column, path_in[1:])  # pyright: ignore[reportAttributeAccessIssue]
    return column


def _text(value, number: int, skip) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return skip("not UTF-8", number)
    if not isinstance(text, str):
        return skip("the column holds no text", number)
    return text
