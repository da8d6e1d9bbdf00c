"""Detect a file's format and compression by its name, and by its first bytes if the name does not determine them.

Names are case-insensitive: `A.JSONL.GZ` is JSON lines. Content decides between the layouts of a `.json` file (JSON
lines, as in C4; an array of records; one object) and whether a `.tsv` file is quoted like CSV.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".py": "text",
}
FORMATS = ("jsonl", "json", "csv", "tsv", "tsv-quoted", "parquet", "text")
"""Values of `--format`; `tsv-quoted` is tab-separated with CSV quoting, as written by Excel and pandas."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".z", ".lzma")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_FIRST_LINES = 3
_LONGEST_LINE = 64_000_000
_TSV_SAMPLE = 1 << 20


def strip_compression(name: str) -> str:
    """A file name in lower case, without its compression suffix."""
    name = name.lower()
    return name.removesuffix(next((suffix for suffix in COMPRESSED if name.endswith(suffix)), ""))


def compression(path: str) -> str | None:
    """`gzip`, `zstd`, `bz2`, `xz`, or None: by the name, else by the first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    for suffix, kind in COMPRESSED.items():
        if path.lower().endswith(suffix):
            return kind
    with open(path, "rb") as file:
        head = file.read(6)
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def open_data(path: str) -> io.BufferedIOBase:
    """Open a file as a stream of its decompressed bytes."""
    kind = compression(path)
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "bz2":
        return bz2.open(path, "rb")
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind == "zstd":
        import pyarrow

        # PyArrow raises when a file ends within a frame and reads on after one; a separate thread makes it no faster.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return io.BufferedReader(io.FileIO(path), 1 << 20)


def open_text(path: str, newline: str) -> io.TextIOWrapper:
    """Open a file as a stream of its decompressed text; bytes that are not UTF-8 become lone surrogates.

    Args:
        path: the file.
        newline: as of `open`.
    """
    data = open_data(path)
    # The stub wants a `name`, which TextIOWrapper itself does not need and bz2's stream lacks before Python 3.13.
    return io.TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline)  # pyright: ignore[reportArgumentType]


def unknown_kind(path: Path) -> str:
    """Why a file's name determines no format, and what to do: `why; fix`, for a message."""
    bare = strip_compression(path.name)
    if bare.endswith(_ARCHIVES):
        return f"{Path(bare).suffix} is an unsupported archive or compression; unpack it first"
    if ".parquet" in path.name.lower() and bare != path.name.lower():
        return f"Parquet compressed with {path.suffix} is not supported; decompress it first"
    fix = {
        "jsonl": "looks like JSON lines; add --format jsonl",
        "json": "looks like JSON; add --format json",
        "parquet": "looks like Parquet; add --format parquet",
    }.get(_guess(path) or "", "add --format text to read every input as text")
    suffix = Path(bare).suffix
    more = f", or --suffix {suffix} to read only {suffix} files as text" if suffix and fix.startswith("add") else ""
    return f"unknown file type; {fix}{more}"


def json_layout(path: str) -> str:
    """The layout of a JSON file: `lines`, `array`, `object` (one, or several over many lines), or `other`.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: the file cannot be read.
    """
    complete = found = 0
    start = b""
    with open_data(path) as file:
        while found < _FIRST_LINES and (line := file.readline(_LONGEST_LINE)):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            found += 1
            start = start or line[:1]
            complete += line.startswith(b"{") and _is_json(line)
    if start == b"[":
        return "array"
    if complete and (complete > 1 or found > 1):
        return "lines"
    return "object" if start == b"{" else "other"


def tsv_kind(path: str) -> str:
    """`tsv-quoted` if the first megabyte forms equally long rows only with CSV quoting, else `tsv`.

    IANA's text/tab-separated-values has no quotes, but Excel and pandas write them around line ends and tabs.
    """
    try:
        with open_data(path) as file:
            data = file.read(_TSV_SAMPLE)
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return "tsv"  # the reader will report the error
    text = data.decode("utf-8-sig", "replace")
    lines = text.splitlines(keepends=True)[: -1 if len(data) == _TSV_SAMPLE else None]
    plain = [line.rstrip("\r\n").split("\t") for line in lines if line.strip("\r\n")]
    doubled = any(_is_doubled(cell) for row in plain for cell in row)
    if not plain or (not doubled and all(len(row) == len(plain[0]) for row in plain)):
        return "tsv"
    try:
        rows = [row for row in csv.reader(lines, strict=True, delimiter="\t") if row]
    except csv.Error as error:
        if len(data) < _TSV_SAMPLE or "unexpected end" not in str(error):
            return "tsv"
        rows = [row for row in csv.reader(lines, delimiter="\t") if row][:-1]
    return "tsv-quoted" if len({len(row) for row in rows}) == 1 else "tsv"


def _is_doubled(cell: str) -> bool:
    """Whether a cell starts with a quote and contains more quotes, all doubled: only CSV quoting writes that."""
    inside = cell[1:].removesuffix('"')
    return cell.startswith('"') and '""' in inside and '"' not in inside.replace('""', "")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


def _guess(path: Path) -> str | None:
    """The format suggested by a file's first bytes; None if unknown."""
    try:
        with open_data(str(path)) as file:
            if file.read(4) == b"PAR1":
                return "parquet"
        if os.path.getsize(path) == 0:
            return None
        return {"lines": "jsonl", "array": "json", "object": "json"}.get(json_layout(str(path)))
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return None
