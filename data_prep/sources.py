"""A corpus: inputs expanded to files in a fixed order, and the documents in them.

An input is a file, a folder, a glob, `stdlib` (the running Python's standard library) or a dataset of the Hugging Face
hub, `hf://NAME[@REVISION][#CONFIG][:SPLIT[:FIELD]]`, which is streamed. A file, folder or glob may name its own field
after a colon, `a.parquet:content`. A document's name is its file's path relative to the input it was found under, plus
its line or row.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import realpath
from pathlib import Path

from elas.data_prep import hub, parquet
from elas.data_prep.fields import missing
from elas.data_prep.formats import COMPRESSED, FORMATS, KINDS, compression
from elas.data_prep.inputs import OURS, STDLIB, Finder, SourceFile, unique_names
from elas.data_prep.readers import WHOLE, columns, read_piece
from elas.errors import ConfigError, UserError

_SAMPLE_PIECE_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Args:
        name: origin, for messages.
        text: encodable as UTF-8.
    """

    name: str
    text: str


class SkipLog:
    """Counts skipped inputs by reason and names the first few of each reason on stderr."""

    NAMED = 3

    def __init__(self):
        self.reasons: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Number of skipped inputs."""
        return self.reasons.total()

    def add(self, reason: str, name: str) -> None:
        """Count one skipped input."""
        kind = kind_of(reason)
        self.reasons[kind] += 1
        if self.reasons[kind] <= self.NAMED:
            print(f"warning: skipped {name}: {reason}", file=sys.stderr)
        elif self.reasons[kind] == self.NAMED + 1:
            print(f"warning: further inputs skipped for the same reason are only counted: {kind}", file=sys.stderr)


def kind_of(reason: str) -> str:
    """A reason without its details in parentheses, for counting."""
    return reason.split(" (")[0]


class Corpus:
    """The documents of some inputs; iterate as often as needed, each time in the same order.

    Args:
        inputs: files, folders, globs, `stdlib`, `hf://…`, optionally with a field, `a.parquet:content`. A file reached
            twice is read once. Output of `elas prep` is ignored.
        field: key or column of the text (`meta.text` if nested) for inputs that do not name their own; text files have
            none.
        suffixes: further suffixes to read as plain text, such as `.md`.
        form: read every file as this one of `formats.FORMATS`; None to decide by name.

    Attributes:
        files: every `SourceFile` to read, in order, with unique names.
        ignored: number of ignored files by suffix, and of hidden and cache folders by name.
        notes: messages about formats that were decided by content.
        skipped: inputs skipped in the latest iteration.

    Raises:
        UserError: an input does not exist, matches nothing or has an unknown suffix.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        field: str = "text",
        suffixes: Sequence[str] = (),
        form: str | None = None,
    ):
        self.inputs = [str(i) for i in inputs]
        self.field, self.form = field, form
        self.kinds = {**KINDS, **{suffix: "text" for suffix in map(_text_suffix, suffixes)}}
        self.skipped = SkipLog()
        if not self.inputs:
            raise UserError("--input: is empty; give a file, a folder, a glob or `stdlib`")
        if form is not None and form not in FORMATS:
            raise ConfigError("--format", form, "is not a format", f"give one of {', '.join(FORMATS)}")
        finder = Finder(field, self.kinds, form)
        self.ignored, self.notes = finder.ignored, finder.notes
        seen: dict[tuple[str, str], SourceFile] = {}
        for given in self.inputs:
            for file in finder.files(given):
                seen.setdefault((file.path if file.kind == "hf" else realpath(file.path), file.field), file)
        if not seen:
            why = "contains only output of elas prep" if self.ignored[OURS] else "contains no readable file"
            raise UserError(f"--input {' '.join(self.inputs)}: {why}; give the text files")
        files = list(seen.values())
        self.files = [replace(file, name=name) for file, name in zip(files, unique_names(files))]
        self.ignored += Counter()  # drops zero counts

    def __iter__(self) -> Iterator[Document]:
        self.skipped = SkipLog()
        for file in self.files:
            yield from self.read(file, WHOLE)

    def read(self, file: SourceFile, piece: tuple[int, int]) -> Iterator[Document]:
        """Yield the documents of a piece of a file; adds to `skipped`."""

        def skip(reason: str, number: int | None) -> None:
            self.skipped.add(reason, place(file, number))

        for number, text in read_piece(file.path, file.kind, file.field, piece, skip):
            yield Document(place(file, number), text)

    def pieces(self, size: int) -> Iterator[tuple[int, tuple[int, int], int]]:
        """Cut all files into pieces; yields the file's index, the piece, and its approximate bytes on disk.

        Args:
            size: maximum bytes per piece where a file can be cut; other files are one piece.
        """
        for index, file in enumerate(self.files):
            if file.kind == "jsonl" and not _is_compressed(file.path):
                count = -(-file.size // size)
                if count <= 1:
                    yield index, WHOLE, file.size
                    continue
                cuts = [file.size * n // count for n in range(count + 1)]
                yield from ((index, (begin, end), end - begin) for begin, end in pairwise(cuts))
            elif file.kind == "parquet":
                groups = [held for held, _ in parquet.row_groups(file.path) or []]
                yield from ((index, piece, held) for piece, held in _row_group_pieces(groups, size))
                if not groups:  # the reader will report the error
                    yield index, WHOLE, file.size
            elif file.kind == "hf":
                yield from ((index, (n, n + 1), size) for n in range(hub.open_dataset(file.path).num_shards))
            else:
                yield index, WHOLE, file.size

    def is_larger_than(self, size: int) -> bool:
        """Whether the files exceed `size` bytes on disk; true with a hub dataset, whose size is unknown."""
        return sum(file.size for file in self.files) > size or any(file.kind == "hf" for file in self.files)

    def some(self, size: int) -> Iterator[Document]:
        """Yield documents from pieces in a fixed pseudo-random order until `size` bytes of text are read."""
        pieces = list(self.pieces(_SAMPLE_PIECE_BYTES))
        pieces.sort(key=lambda p: hashlib.blake2b(f"{self.files[p[0]].name}\0{p[1]}".encode(errors="replace")).digest())
        self.skipped = SkipLog()
        for index, piece, _ in pieces:
            for document in self.read(self.files[index], piece):
                if size <= 0:
                    return
                size -= len(document.text.encode())
                yield document

    def without_column(self) -> list[tuple[SourceFile, str]]:
        """Tables and datasets without the text column, each with the skip reason; reads headers only."""
        found = []
        for file in self.files:
            present = columns(file.path, file.kind)
            if present is not None and file.field not in present and not _is_nested(file.field, present):
                found.append((file, missing("column", file.field, present)))
        return found

    def large_pages(self) -> list[str]:
        """A warning for every Parquet file that may take more than `parquet.LARGE` bytes of a worker's memory."""
        fix = "write it with smaller row groups (row_group_size=16)"
        tables = [file for file in self.files if file.kind == "parquet"]
        sizes = ((file, parquet.required_memory(file.path, file.field)) for file in tables)
        return [
            f"warning: {file.name}: large pages, which may take {size / 1e6:,.0f} MB of memory per worker; {fix}"
            for file, size in sizes
            if size > parquet.LARGE
        ]

    def describe(self) -> dict:
        """The inputs and how they are read, for a manifest."""
        facts = {"inputs": self.inputs, "files": len(self.files), "field": self.field, "suffixes": list(self.kinds)}
        facts["format"] = self.form
        facts["ignored"] = dict(sorted(self.ignored.items()))
        if STDLIB in self.inputs:
            facts["python"] = sys.version.split()[0]
        return facts


def place(file: SourceFile, number: int | None) -> str:
    """Location for messages: `name`, or `name:number` if a file holds many documents."""
    return file.name if number is None or file.kind == "text" else f"{file.name}:{number}"


def stdlib_corpus() -> Corpus:
    """The running Python's standard library source: always available, and the same for one Python version."""
    return Corpus([STDLIB])


def held_out(text: str | bytes, fraction: float, max_bytes: int | None = None) -> bool:
    """Whether a document belongs to the held-out `fraction` of documents, by hash of its text.

    The split does not depend on files, order or machine, and copies of a document are on the same side. Documents of
    more than `max_bytes` are never held out: in a small corpus, one of them would be most of the held-out text.
    """
    data = text.encode() if isinstance(text, str) else text
    if max_bytes is not None and len(data) > max_bytes:
        return False
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < fraction * 2**64


def check_fraction(key: str, fraction: float) -> None:
    """Raise `ConfigError` unless 0 ≤ `fraction` < 1."""
    if not 0 <= fraction < 1:
        raise ConfigError(key, fraction, "must be at least 0 and less than 1", "give a fraction such as 0.02")


def _text_suffix(given: str) -> str:
    """`--suffix` in lower case with its dot; raises `ConfigError` if it already has a meaning."""
    suffix = "." + given.lower().lstrip(".")
    kind = KINDS.get(suffix, "text")
    if suffix in COMPRESSED:
        why, fix = "is a compression, which is always decompressed", "give the suffix before it"
        raise ConfigError("--suffix", given, why, fix)
    if kind != "text":
        raise ConfigError("--suffix", given, f"is read as {kind}", "give --format text to read it as text")
    return suffix


def _is_nested(field: str, present: list[str]) -> bool:
    """Whether the field is inside a column, or is itself a struct; its rows are then checked one by one."""
    return any(field.startswith(f"{name}.") or name.startswith(f"{field}.") for name in present)


def _is_compressed(path: str) -> bool:
    try:
        return compression(path) is not None
    except OSError:
        return True  # the reader will report the error


def _row_group_pieces(groups: list[int], size: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Group neighbouring row groups up to `size` bytes; yields each piece and its bytes."""
    begin, held = 0, 0
    for number, group in enumerate(groups):
        if held and held + group > size:
            yield (begin, number), held
            begin, held = number, 0
        held += group
    if groups:
        yield (begin, len(groups)), held
