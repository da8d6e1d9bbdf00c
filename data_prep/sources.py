"""Where documents come from: JSONL (one a line) and plain text or source files (one a file), read as a stream.

A document's name is its path relative to the input it was found under (`name:line` in JSONL). The held-out split hashes
that name, so it is the same on every machine, in every order, and wherever the folder lies.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elas.errors import ConfigError, UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".py")
STDLIB = "stdlib"
# UTF-8 itself cannot hold half a surrogate pair; only a JSON escape can bring one in.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Args:
        name: identifies it; decides whether it is held out.
        text: its text, encodable as UTF-8.
    """

    name: str
    text: str


class SkipLog:
    """Counts what was left out, by reason, and names the first few on stderr."""

    NAMED = 5

    def __init__(self):
        self.reasons: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many inputs were left out."""
        return self.reasons.total()

    def add(self, reason: str, name: str) -> None:
        """Count one input left out for `reason`."""
        self.reasons[reason] += 1
        if self.total <= self.NAMED:
            print(f"warning: skipped {name}: {reason}", file=sys.stderr)
        elif self.total == self.NAMED + 1:
            print("warning: more inputs skipped; from here on they are only counted", file=sys.stderr)


class Corpus:
    """The documents of some inputs; iterate as often as needed, each time in the same order.

    Args:
        inputs: files, folders, globs, or `stdlib` (this Python's own standard library).
            A file reached twice is read once.
        field: key of the text in JSONL records.
        suffixes: further suffixes to read as plain text, `.md`; `.gz` on top is understood.

    Attributes:
        files: `(name, path)` of every file that will be read.
        ignored: how many files in folders were passed over, by suffix, and hidden and cache folders, by name.
        skipped: what the latest iteration left out.

    Raises:
        UserError: an input that does not exist, matches nothing or has a suffix we cannot read.
    """

    def __init__(self, inputs: Sequence[str | Path], *, field: str = "text", suffixes: Sequence[str] = ()):
        self.inputs = [str(i) for i in inputs]
        self.field = field
        self.suffixes = (*JSONL_SUFFIXES, *TEXT_SUFFIXES, *("." + s.lstrip(".") for s in suffixes))
        self.ignored: Counter[str] = Counter()
        self.skipped = SkipLog()
        if not self.inputs:
            raise UserError("--input: nothing given; name a file, a folder, a glob or `stdlib`")
        seen: dict[str, tuple[str, Path]] = {}
        for each in self.inputs:
            for name, path in self._expand(each):
                seen.setdefault(os.path.realpath(path), (name, path))
        self.files = list(seen.values())

    def __iter__(self) -> Iterator[Document]:
        self.skipped = SkipLog()
        for name, path in self.files:
            try:
                if path.name.endswith(JSONL_SUFFIXES):
                    yield from self._read_jsonl(name, path)
                else:
                    yield from self._read_text(name, path)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                self.skipped.add("damaged gzip", name)
            except OSError as error:
                self.skipped.add(f"unreadable ({error.strerror})", name)

    def describe(self) -> dict:
        """What was read and how, for a manifest."""
        facts = {"inputs": self.inputs, "files": len(self.files), "field": self.field, "suffixes": list(self.suffixes)}
        facts["ignored"] = dict(sorted(self.ignored.items()))
        if STDLIB in self.inputs:
            facts["python"] = sys.version.split()[0]
        return facts

    def _expand(self, given: str) -> list[tuple[str, Path]]:
        """The `(name, path)` pairs behind one input."""
        if given == STDLIB:
            return _walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), Counter(), {"site-packages", "dist-packages"})
        path = Path(given)
        if path.is_dir():
            found = _walk(path, self.suffixes, self.ignored)
            if not found:
                kinds = " ".join(self.suffixes)
                raise UserError(f"--input {given}: no file ends in any of {kinds}; name others with --suffix")
            return found
        if path.is_file():
            if not path.name.endswith(self.suffixes):
                raise UserError(f"--input {given}: unknown kind of file; to read it as text add --suffix {path.suffix}")
            return [(path.name, path)]
        if glob.has_magic(given):
            return self._expand_glob(given)
        raise UserError(f"--input {given}: no such file or folder; give a path, a glob or `stdlib`")

    def _expand_glob(self, pattern: str) -> list[tuple[str, Path]]:
        fixed = Path(pattern)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
        found = [p for p in files if p.name.endswith(self.suffixes)]
        self.ignored.update(p.suffix for p in files if not p.name.endswith(self.suffixes))
        if not found:
            raise UserError(f"--input {pattern}: matches no file that can be read; check the pattern or add --suffix")
        return [(p.relative_to(fixed).as_posix(), p) for p in found]

    def _read_jsonl(self, name: str, path: Path) -> Iterator[Document]:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{name}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue  # blank lines hold no document
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError:
                    self.skipped.add("not UTF-8", where)
                    continue
                except (ValueError, RecursionError):
                    self.skipped.add("malformed JSON", where)
                    continue
                text = record.get(self.field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    self.skipped.add(f"no text in field {self.field!r}", where)
                elif _SURROGATE_ESCAPE.search(line) and not _encodable(text):
                    self.skipped.add("half a surrogate pair", where)
                else:
                    yield Document(where, text)

    def _read_text(self, name: str, path: Path) -> Iterator[Document]:
        with _open(path) as file:
            data = file.read()
        try:
            yield Document(name, data.removeprefix(b"\xef\xbb\xbf").decode(_encoding(path, data)))
        except (UnicodeDecodeError, SyntaxError, LookupError):
            self.skipped.add("not UTF-8", name)


def stdlib_corpus() -> Corpus:
    """The running Python's own standard library source: text that is always at hand, and the same for one Python."""
    return Corpus([STDLIB])


def held_out(name: str, fraction: float) -> bool:
    """Whether the document called `name` belongs to the held-out `fraction` (of documents, by hash of the name)."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()) < fraction * 2**64


def check_fraction(key: str, fraction: float) -> None:
    """Raise `ConfigError` unless `fraction` can be a held-out fraction."""
    if not 0 <= fraction < 1:
        raise ConfigError(key, fraction, "is not a fraction of the documents", "give 0 or more and less than 1, 0.02")


def _walk(root: Path, suffixes: tuple[str, ...], ignored: Counter, left_out=frozenset()) -> list[tuple[str, Path]]:
    """Files below `root` ending in `suffixes`, by relative path, but not in hidden, cache and `left_out` folders."""

    def stop(error: OSError):
        raise UserError(f"--input {error.filename}: {error.strerror}; make it readable or give other inputs")

    found = []
    for folder, subfolders, names in os.walk(root, onerror=stop):
        passed = {s for s in subfolders if s.startswith(".") or s == "__pycache__" or s in left_out}
        ignored.update(f"{s}/" for s in passed)
        subfolders[:] = [s for s in subfolders if s not in passed]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffixes):
                found.append((path.relative_to(root).as_posix(), path))
            else:
                ignored[path.suffix or name] += 1
    return sorted(found)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _encoding(path: Path, data: bytes) -> str:
    """UTF-8, or what a Python source file declares for itself (PEP 263) when it is not UTF-8."""
    try:
        data.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.suffix == ".py" else "utf-8"


def _encodable(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
