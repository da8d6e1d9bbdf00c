"""What there is to read: inputs as the user names them, expanded to files in a fixed order, and their documents.

An input is a file, a folder, a glob, `stdlib` (this Python's own standard library) or a dataset of the Hugging Face
hub, `hf://NAME[@REVISION][#CONFIG][:SPLIT[:FIELD]]`, which is streamed. A file, folder or glob may name its own field
behind a colon, `a.parquet:content`. How a file is read goes by its name, see `formats`. A document's name is its file's
path relative to the input it was found under, and its line or row.
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

_SPREAD = 4_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Args:
        name: where it came from, for messages.
        text: its text, encodable as UTF-8.
    """

    name: str
    text: str


class SkipLog:
    """Counts what was left out, by reason, and names the first few of each on stderr."""

    NAMED = 3

    def __init__(self):
        self.reasons: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many inputs were left out."""
        return self.reasons.total()

    def add(self, reason: str, name: str) -> None:
        """Count one input left out for `reason`."""
        kind = kind_of(reason)
        self.reasons[kind] += 1
        if self.reasons[kind] <= self.NAMED:
            print(f"warning: skipped {name}: {reason}", file=sys.stderr)
        elif self.reasons[kind] == self.NAMED + 1:
            print(f"warning: more inputs skipped for the same reason, only counted now: {kind}", file=sys.stderr)


def kind_of(reason: str) -> str:
    """A reason without its particulars, to count by."""
    return reason.split(" (")[0]


class Corpus:
    """The documents of some inputs; iterate as often as needed, each time in the same order.

    Args:
        inputs: files, folders, globs, `stdlib`, `hf://…`, also with a field, `a.parquet:content`. A file reached twice
            is read once. What `elas prep` wrote is passed over.
        field: key or column of the text in all formats but text, where an input does not name its own; `meta.text` for
            a nested one.
        suffixes: further suffixes to read as plain text, `.md`.
        form: one of `formats.FORMATS`: how every file is read, whatever its name; None to go by names.

    Attributes:
        files: every `SourceFile` that will be read, in order; no two have the same name.
        ignored: how many files in folders were passed over, by suffix, and hidden and cache folders, by name.
        notes: lines for the user about what was decided by looking into files.
        skipped: what the latest iteration left out.

    Raises:
        UserError: an input that does not exist, matches nothing or cannot be read by its name.
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
            raise UserError("--input: nothing given; name a file, a folder, a glob or `stdlib`")
        if form is not None and form not in FORMATS:
            raise ConfigError("--format", form, "is not a format", f"give one of {', '.join(FORMATS)}")
        finder = Finder(field, self.kinds, form)
        self.ignored, self.notes = finder.ignored, finder.notes
        seen: dict[tuple[str, str], SourceFile] = {}
        for given in self.inputs:
            for file in finder.files(given):
                seen.setdefault((file.path if file.kind == "hf" else realpath(file.path), file.field), file)
        if not seen:
            why = "holds only what elas prep wrote itself" if self.ignored[OURS] else "holds no file that can be read"
            raise UserError(f"--input {' '.join(self.inputs)}: {why}; name the text")
        files = list(seen.values())
        self.files = [replace(file, name=name) for file, name in zip(files, unique_names(files))]
        self.ignored += Counter()  # only what is there

    def __iter__(self) -> Iterator[Document]:
        self.skipped = SkipLog()
        for file in self.files:
            yield from self.read(file, WHOLE)

    def read(self, file: SourceFile, piece: tuple[int, int]) -> Iterator[Document]:
        """The documents of a piece of one of the files; adds to `skipped`."""

        def skip(reason: str, number: int | None) -> None:
            self.skipped.add(reason, place(file, number))

        for number, text in read_piece(file.path, file.kind, file.field, piece, skip):
            yield Document(place(file, number), text)

    def pieces(self, size: int) -> Iterator[tuple[int, tuple[int, int], int]]:
        """All files cut where they can be: index of the file, piece, and about how many bytes it holds on disk.

        Args:
            size: bytes that a piece should hold at most; a file that cannot be cut is one piece.
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
                if not groups:  # reading it will say why
                    yield index, WHOLE, file.size
            elif file.kind == "hf":
                yield from ((index, (n, n + 1), size) for n in range(hub.open_dataset(file.path).num_shards))
            else:
                yield index, WHOLE, file.size

    def is_larger_than(self, size: int) -> bool:
        """Whether it holds more bytes on disk; a dataset of the hub, whose size is not known, does."""
        return sum(file.size for file in self.files) > size or any(file.kind == "hf" for file in self.files)

    def some(self, size: int) -> Iterator[Document]:
        """Documents from all over the corpus until `size` bytes of text are read: the same ones every time."""
        pieces = list(self.pieces(_SPREAD))
        pieces.sort(key=lambda p: hashlib.blake2b(f"{self.files[p[0]].name}\0{p[1]}".encode(errors="replace")).digest())
        self.skipped = SkipLog()
        for index, piece, _ in pieces:
            for document in self.read(self.files[index], piece):
                if size <= 0:
                    return
                size -= len(document.text.encode())
                yield document

    def without_column(self) -> list[tuple[SourceFile, str]]:
        """Tables and datasets that lack the column of the text, each with the reason; reads headers only."""
        found = []
        for file in self.files:
            there = columns(file.path, file.kind)
            if there is not None and file.field not in there and not _is_nested(file.field, there):
                found.append((file, missing("column", file.field, there)))
        return found

    def large_pages(self) -> list[str]:
        """A warning for every Parquet file of which a worker may have to hold more than `parquet.LARGE` bytes."""
        fix = "written with smaller row groups (row_group_size=16) it takes less"
        needs = ((file, parquet.needs(file.path, file.field)) for file in self.files if file.kind == "parquet")
        return [
            f"warning: {file.name}: has large pages, for which a worker may take {size / 1e6:,.0f} MB; {fix}"
            for file, size in needs
            if size > parquet.LARGE
        ]

    def describe(self) -> dict:
        """What was read and how, for a manifest."""
        facts = {"inputs": self.inputs, "files": len(self.files), "field": self.field, "suffixes": list(self.kinds)}
        facts["format"] = self.form
        facts["ignored"] = dict(sorted(self.ignored.items()))
        if STDLIB in self.inputs:
            facts["python"] = sys.version.split()[0]
        return facts


def place(file: SourceFile, number: int | None) -> str:
    """Where something is, for people: `name`, or `name:number` where a file holds many documents."""
    return file.name if number is None or file.kind == "text" else f"{file.name}:{number}"


def stdlib_corpus() -> Corpus:
    """The running Python's own standard library source: text that is always at hand, and the same for one Python."""
    return Corpus([STDLIB])


def held_out(text: str | bytes, fraction: float, max_bytes: int | None = None) -> bool:
    """Whether a document belongs to the held-out `fraction` (of documents, by hash of the text).

    So the split does not depend on files, order or machine, and copies of a document fall on the same side. Documents
    of more than `max_bytes` never do: in a small corpus, one of them would be most of the held-out text.
    """
    data = text.encode() if isinstance(text, str) else text
    if max_bytes is not None and len(data) > max_bytes:
        return False
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < fraction * 2**64


def check_fraction(key: str, fraction: float) -> None:
    """Raise `ConfigError` unless `fraction` can be a held-out fraction."""
    if not 0 <= fraction < 1:
        raise ConfigError(key, fraction, "is not a fraction of the documents", "give 0 or more and less than 1, 0.02")


def _text_suffix(given: str) -> str:
    """`--suffix` in lower case with its dot, unless its files are read in another way."""
    suffix = "." + given.lower().lstrip(".")
    kind = KINDS.get(suffix, "text")
    if suffix in COMPRESSED:
        why, fix = "is a compression, which is opened anyway", "give the suffix before it"
        raise ConfigError("--suffix", given, why, fix)
    if kind != "text":
        raise ConfigError("--suffix", given, f"is read as {kind}", "to read it as text give --format text")
    return suffix


def _is_nested(field: str, there: list[str]) -> bool:
    """Whether the field lies in a column, or is a struct itself, whose rows are then named one by one."""
    return any(field.startswith(f"{name}.") or name.startswith(f"{field}.") for name in there)


def _is_compressed(path: str) -> bool:
    try:
        return compression(path) is not None
    except OSError:
        return True  # reading it will say why it cannot be read


def _row_group_pieces(groups: list[int], size: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Neighbouring row groups of up to `size` bytes together."""
    begin, held = 0, 0
    for number, group in enumerate(groups):
        if held and held + group > size:
            yield (begin, number), held
            begin, held = number, 0
        held += group
    if groups:
        yield (begin, len(groups)), held
