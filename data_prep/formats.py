"""What a file is: its format and its compression, by its name, and by its first bytes where the name does not say.

Names are read without regard to case: `A.JSONL.GZ` is JSON lines. A `.json` file may hold JSON lines (as C4's do), an
array of records or one object, and a `.tsv` may be quoted as CSV is or not at all: their content decides.
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
"""What `--format` may say; `tsv-quoted` is tab-separated with CSV's quotes, as Excel and pandas write it."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".z", ".lzma")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_FIRST_LINES = 3
_LONGEST_LINE = 64_000_000
_TSV_SAMPLE = 1 << 20


def strip_compression(name: str) -> str:
    """A file's name in lower case, without the suffix of a compression."""
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
    """Open a file to read what is in it, decompressed, as a stream."""
    kind = compression(path)
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "bz2":
        return bz2.open(path, "rb")
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind == "zstd":
        import pyarrow

        # It says when a file ends within a frame, and goes on after one; read by a thread of its own it is no faster.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return open(path, "rb", buffering=1 << 20)


def unknown_kind(path: Path) -> str:
    """Why a file cannot be read by its name, and what to do: `why; fix`, for a message."""
    bare = strip_compression(path.name)
    if bare.endswith(_ARCHIVES):
        return f"{Path(bare).suffix} is an archive or a compression that cannot be read; unpack it first"
    if ".parquet" in path.name.lower() and bare != path.name.lower():
        return f"Parquet cannot be read through {path.suffix}; decompress it first"
    fix = {
        "jsonl": "looks like JSON lines; add --format jsonl",
        "json": "looks like JSON; add --format json",
        "parquet": "looks like Parquet; add --format parquet",
    }.get(_guess(path), "to read every input as text add --format text")
    suffix = Path(bare).suffix
    more = f", or to read {suffix} as text --suffix {suffix}" if suffix and fix.startswith("to read") else ""
    return f"unknown kind of file; {fix}{more}"


def json_layout(path: str) -> str:
    """How JSON lies in a file: `lines`, `array`, `object` (one, or several over many lines), or `other`.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read.
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
    """`tsv`, unless its first megabyte makes rows only with CSV's quotes: then `tsv-quoted`.

    IANA's text/tab-separated-values has no quotes. Excel and pandas write them all the same, around line ends and tabs.
    """
    try:
        with open_data(path) as file:
            data = file.read(_TSV_SAMPLE)
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return "tsv"  # reading it will say why
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
    """Whether a cell begins with a quote and has more in it, each of them doubled: what only CSV's rules write."""
    inside = cell[1:].removesuffix('"')
    return cell.startswith('"') and '""' in inside and '"' not in inside.replace('""', "")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


def _guess(path: Path) -> str | None:
    """The format that a file's first bytes show."""
    try:
        with open_data(str(path)) as file:
            if file.read(4) == b"PAR1":
                return "parquet"
        if os.path.getsize(path) == 0:
            return None
        return {"lines": "jsonl", "array": "json", "object": "json"}.get(json_layout(str(path)))
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return None
