"""What there is to read: inputs as the user names them, expanded to files in a fixed order, and their documents.

An input is a file, a folder, a glob, `stdlib` (this Python's own standard library) or a dataset of the Hugging Face
hub, `hf://NAME[@REVISION][#CONFIG][:SPLIT]`, which is streamed. How a file is read goes by its name: see `KINDS`, with
`.gz` or `.zst` on top. A document's name is its file's path relative to the input it was found under, and its line or
row.
"""

import contextlib
import glob
import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from elas.data_prep.readers import WHOLE, parquet_row_groups, read_piece
from elas.errors import ConfigError, UserError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".py": "text",
}
COMPRESSED = (".gz", ".zst")
STDLIB = "stdlib"
HUB = "hf://"
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


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read.

    Args:
        name: its path relative to the input it was found under, or the dataset's name.
        path: where it lies; for a dataset, what `readers.open_dataset` takes.
        kind: how it is read: a value of `KINDS`, or `hf`.
        source: the input that it belongs to, as the user gave it.
        size: bytes on disk; 0 for a dataset.
        mtime_ns: when it last changed; 0 for a dataset.
    """

    name: str
    path: str
    kind: str
    source: str
    size: int = 0
    mtime_ns: int = 0

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file is not the one that was looked at when the work was planned."""
        if not self.mtime_ns:
            return
        try:
            now = os.stat(self.path)
            same = (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)
        except OSError:
            same = False
        if not same:
            fix = "put it back as it was (size and time of change), or start afresh with --overwrite"
            raise UserError(f"--input {self.path}: changed while it was being read; {fix}")


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
        inputs: files, folders, globs, `stdlib`, `hf://…`. A file reached twice is read once.
        field: key or column of the text in JSONL, CSV, Parquet and datasets.
        suffixes: further suffixes to read as plain text, `.md`.

    Attributes:
        files: every `SourceFile` that will be read, in order.
        ignored: how many files in folders were passed over, by suffix, and hidden and cache folders, by name.
        skipped: what the latest iteration left out.

    Raises:
        UserError: an input that does not exist, matches nothing or has a suffix we cannot read.
    """

    def __init__(self, inputs: Sequence[str | Path], *, field: str = "text", suffixes: Sequence[str] = ()):
        self.inputs = [str(i) for i in inputs]
        self.field = field
        self.kinds = {**KINDS, **{"." + s.lstrip("."): "text" for s in suffixes}}
        self.ignored: Counter[str] = Counter()
        self.skipped = SkipLog()
        if not self.inputs:
            raise UserError("--input: nothing given; name a file, a folder, a glob or `stdlib`")
        seen: dict[str, SourceFile] = {}
        for each in self.inputs:
            if each.startswith(HUB):
                seen.setdefault(each, _dataset(each))
                continue
            for name, path in self._expand(each):
                seen.setdefault(os.path.realpath(path), self._file(name, path, each))
        self.files = list(seen.values())

    def __iter__(self) -> Iterator[Document]:
        self.skipped = SkipLog()
        for file in self.files:
            yield from self.read(file, WHOLE)

    def read(self, file: SourceFile, piece: tuple[int, int]) -> Iterator[Document]:
        """The documents of a piece of one of the files; adds to `skipped`."""

        def skip(reason: str, number: int | None) -> None:
            self.skipped.add(reason, place(file, number))

        for number, text in read_piece(file.path, file.kind, self.field, piece, skip):
            yield Document(place(file, number), text)

    def pieces(self, size: int) -> Iterator[tuple[int, tuple[int, int], int]]:
        """All files cut where they can be: index of the file, piece, and about how many bytes it holds on disk.

        Args:
            size: bytes that a piece should hold at most; a file that cannot be cut is one piece.
        """
        for index, file in enumerate(self.files):
            if file.kind == "jsonl" and not file.path.endswith(COMPRESSED):
                count = -(-file.size // size)
                if count <= 1:
                    yield index, WHOLE, file.size
                    continue
                cuts = [file.size * n // count for n in range(count + 1)]
                yield from ((index, (begin, end), end - begin) for begin, end in pairwise(cuts))
            elif file.kind == "parquet":
                groups = [held for held, _ in parquet_row_groups(file.path) or []]
                yield from ((index, piece, held) for piece, held in _row_group_pieces(groups, size))
                if not groups:  # reading it will say why
                    yield index, WHOLE, file.size
            elif file.kind == "hf":
                from elas.data_prep.readers import open_dataset

                yield from ((index, (n, n + 1), size) for n in range(open_dataset(file.path).num_shards))
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

    def describe(self) -> dict:
        """What was read and how, for a manifest."""
        facts = {"inputs": self.inputs, "files": len(self.files), "field": self.field, "suffixes": list(self.kinds)}
        facts["ignored"] = dict(sorted(self.ignored.items()))
        if STDLIB in self.inputs:
            facts["python"] = sys.version.split()[0]
        return facts

    def _kind(self, path: Path) -> str | None:
        name = path.name
        for suffix in COMPRESSED:
            name = name.removesuffix(suffix)
        kind = next((kind for suffix, kind in self.kinds.items() if name.endswith(suffix)), None)
        return None if kind == "parquet" and name != path.name else kind

    def _file(self, name: str, path: Path, given: str) -> SourceFile:
        size = mtime = 0
        with contextlib.suppress(OSError):  # a link to nowhere: reading it will say so
            size, mtime = path.stat().st_size, path.stat().st_mtime_ns
        return SourceFile(name, os.path.abspath(path), self._kind(path), given, size, mtime)

    def _expand(self, given: str) -> list[tuple[str, Path]]:
        """The `(name, path)` pairs behind one input."""
        if given == STDLIB:
            root = Path(sysconfig.get_paths()["stdlib"])
            return self._walk(root, left_out={"site-packages", "dist-packages"}, only=".py", ignored=Counter())
        path = Path(given)
        if path.is_dir():
            found = self._walk(path)
            if not found:
                kinds = " ".join(self.kinds)
                raise UserError(f"--input {given}: no file ends in any of {kinds}; name others with --suffix")
            return found
        if path.is_file():
            if ".parquet" in path.suffixes[:-1]:
                raise UserError(f"--input {given}: Parquet cannot be read through {path.suffix}; decompress it first")
            if self._kind(path) is None:
                raise UserError(f"--input {given}: unknown kind of file; to read it as text add --suffix {path.suffix}")
            return [(path.name, path)]
        if path.exists():
            raise UserError(f"--input {given}: is no regular file, and may be read only once; copy it to one")
        if glob.has_magic(given):
            return self._expand_glob(given)
        raise UserError(f"--input {given}: no such file or folder; give a path, a glob, `stdlib` or hf://DATASET")

    def _expand_glob(self, pattern: str) -> list[tuple[str, Path]]:
        fixed = Path(pattern)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
        found = [p for p in files if self._kind(p)]
        self.ignored.update(p.suffix for p in files if not self._kind(p))
        if not found:
            raise UserError(f"--input {pattern}: matches no file that can be read; check the pattern or add --suffix")
        return [(p.relative_to(fixed).as_posix(), p) for p in found]

    def _walk(self, root: Path, left_out=frozenset(), only: str = "", ignored=None) -> list[tuple[str, Path]]:
        """Files below `root` that can be read, by relative path, but not in hidden, cache and `left_out` folders."""
        ignored = self.ignored if ignored is None else ignored

        def stop(error: OSError):
            raise UserError(f"--input {error.filename}: {error.strerror}; make it readable or give other inputs")

        found, seen = [], {os.path.realpath(root)}
        for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=not left_out):
            passed = {s for s in subfolders if s.startswith(".") or s == "__pycache__" or s in left_out}
            ignored.update(f"{s}/" for s in passed)
            real = {s: os.path.realpath(Path(folder, s)) for s in sorted(subfolders) if s not in passed}
            subfolders[:] = [s for s, target in real.items() if target not in seen]  # a link may lead back here
            seen.update(real.values())
            for name in names:
                path = Path(folder, name)
                if path.exists() and not path.is_file():
                    ignored["no regular file"] += 1
                elif self._kind(path) and name.endswith(only):
                    found.append((path.relative_to(root).as_posix(), path))
                else:
                    ignored[path.suffix or name] += 1
        return sorted(found)


def place(file: SourceFile, number: int | None) -> str:
    """Where something is, for people: `name`, or `name:number` where a file holds many documents."""
    return file.name if number is None or file.kind == "text" else f"{file.name}:{number}"


def stdlib_corpus() -> Corpus:
    """The running Python's own standard library source: text that is always at hand, and the same for one Python."""
    return Corpus([STDLIB])


def held_out(text: str | bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction` (of documents, by hash of the text).

    So the split does not depend on files, order or machine, and copies of a document fall on the same side.
    """
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < fraction * 2**64


def check_fraction(key: str, fraction: float) -> None:
    """Raise `ConfigError` unless `fraction` can be a held-out fraction."""
    if not 0 <= fraction < 1:
        raise ConfigError(key, fraction, "is not a fraction of the documents", "give 0 or more and less than 1, 0.02")


def _dataset(given: str) -> SourceFile:
    name = given.removeprefix(HUB)
    if ":" not in name:
        name += ":train"
    if not name.split(":")[0]:
        raise UserError(f"--input {given}: no dataset named; write hf://NAME[@REVISION][#CONFIG][:SPLIT]")
    return SourceFile(name, name, "hf", given)


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
