"""Expand the user's inputs to files: paths, folders and globs, each optionally with a field (`PATH:FIELD`).

Output of `elas prep` below an input (work folders, token files, their lists and reports, tokenizers) is never read as
input, so running a command twice reads the same files.
"""

import contextlib
import glob
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elas.data_prep import fields, hub
from elas.data_prep.formats import KINDS, json_layout, open_data, strip_compression, tsv_kind, unknown_kind
from elas.errors import UserError

STDLIB = "stdlib"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages"})
OURS = "written by elas prep"
_OUTPUTS = (".bin", ".idx", ".manifest.json", ".skipped.jsonl")
_LARGEST_OBJECT = 64_000_000
_REPORT_KEYS = ({"tokenizer_sha256"}, {"ok", "files", "bad", "corpora"}, {"prefix", "histogram", "samples"})
_CANNOT_READ = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, RecursionError)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file or hub dataset to read.

    Args:
        name: path relative to the input it was found under, with more leading folders if needed to be unique; or the
            dataset's name.
        path: absolute path; for a dataset, the argument of `hub.open_dataset`.
        kind: one of `formats.FORMATS`, or `hf`.
        source: the input it belongs to, as given by the user.
        size: bytes on disk; 0 for a dataset.
        mtime_ns: modification time; 0 for a dataset.
        field: key or column of the text.
    """

    name: str
    path: str
    kind: str
    source: str
    size: int = 0
    mtime_ns: int = 0
    field: str = "text"

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file's size or modification time has changed since the work was planned."""
        if not self.mtime_ns:
            return
        try:
            now = os.stat(self.path)
            same = (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)
        except OSError:
            same = False
        if not same:
            fix = "restore it (size and modification time), or start over with --overwrite"
            raise UserError(f"--input {self.path}: changed since the work was planned; {fix}")


class Finder:
    """Expands inputs to files.

    Args:
        field: key or column of the text for inputs that do not name their own.
        kinds: kind by suffix.
        form: format of every file; None to decide by name.

    Attributes:
        ignored: number of ignored files by suffix or reason, and of hidden and cache folders by name.
        notes: messages about formats that were decided by content.
    """

    def __init__(self, field: str, kinds: dict[str, str] | None = None, form: str | None = None):
        self.field, self.kinds, self.form = field, kinds or KINDS, form
        self.ignored: Counter[str] = Counter()
        self.notes: list[str] = []
        self._is_work_folder: dict[Path, bool] = {}
        self._sniffed: Counter[str] = Counter()

    def files(self, given: str) -> Iterator[SourceFile]:
        """Yield the files of one input in order.

        Raises:
            UserError: the input does not exist, matches nothing or has an unknown suffix.
        """
        if given.startswith(hub.HUB):
            name, field = hub.parse(given)
            yield SourceFile(name, name, "hf", given, field=field or self.field)
            return
        where, field = _split_field(given)
        for name, path in self._expand(given, where):
            file = self._file(name, path, given, field, named=path == Path(where))
            if file is not None:
                yield file

    def _expand(self, given: str, where: str) -> list[tuple[str, Path]]:
        """The `(name, path)` pairs of one input."""
        if where == STDLIB:
            root = Path(sysconfig.get_paths()["stdlib"])
            return self._walk(root, left_out=_NOT_STDLIB, only=".py", ignored=Counter())
        path = Path(where)
        if os.path.lexists(path) and self._is_ours(path):
            self.ignored[OURS] += 1
            return []
        if path.is_dir():
            before = self.ignored[OURS]
            found = self._walk(path)
            if not found and self.ignored[OURS] == before:
                kinds = " ".join(self.kinds)
                fix = "give other suffixes with --suffix, or a --format"
                raise UserError(f"--input {given}: no file ends in any of {kinds}; {fix}")
            return found
        if path.is_file():
            if self._kind(path) is None:
                raise UserError(f"--input {given}: {unknown_kind(path)}")
            return [(path.name, path)]
        if path.exists():
            raise UserError(f"--input {given}: not a regular file, and must be readable twice; copy it to a file")
        if glob.has_magic(where):
            return self._expand_glob(given, where)
        raise UserError(f"--input {given}: no such file or folder; give a path, a glob, `stdlib` or hf://DATASET")

    def _expand_glob(self, given: str, pattern: str) -> list[tuple[str, Path]]:
        """The `(name, path)` pairs that a pattern matches; matching folders are read recursively."""
        fixed = Path(pattern)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        found, before = [], self.ignored[OURS]
        for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
            if self._is_ours(path):
                self.ignored[OURS] += 1
            elif path.is_dir():
                inside = path.relative_to(fixed)
                found += [((inside / name).as_posix(), file) for name, file in self._walk(path)]
            elif path.is_file() and self._kind(path):
                found.append((path.relative_to(fixed).as_posix(), path))
            elif path.is_file():
                self.ignored[path.suffix or path.name] += 1
        if not found and self.ignored[OURS] == before:
            fix = "check the pattern, or add --suffix or --format"
            raise UserError(f"--input {given}: matches no readable file; {fix}")
        return found

    def _walk(
        self, root: Path, left_out: frozenset[str] = frozenset(), only: str = "", ignored: Counter | None = None
    ) -> list[tuple[str, Path]]:
        """Readable files below `root` by relative path, except in hidden, cache and `left_out` folders."""
        ignored = self.ignored if ignored is None else ignored

        def stop(error: OSError):
            raise UserError(f"--input {error.filename}: {error.strerror}; make it readable or give other inputs")

        found, seen = [], {os.path.realpath(root)}
        for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=not left_out):
            skipped = {s for s in subfolders if s.startswith(".") or s == "__pycache__" or s in left_out}
            ignored.update(f"{s}/" for s in skipped)
            ours = {s for s in subfolders if s not in skipped and self._is_ours(Path(folder, s))}
            ignored[OURS] += len(ours)
            real = {s: os.path.realpath(Path(folder, s)) for s in sorted(subfolders) if s not in skipped | ours}
            subfolders[:] = [s for s, target in real.items() if target not in seen]  # links may form a cycle
            seen.update(real.values())
            for name in names:
                path = Path(folder, name)
                if path.exists() and not path.is_file():
                    ignored["not a regular file"] += 1
                elif self._is_ours(path):
                    ignored[OURS] += 1
                elif self._kind(path) and name.endswith(only) and not name.startswith("."):
                    found.append((path.relative_to(root).as_posix(), path))
                else:
                    ignored[path.suffix or name] += 1
        return sorted(found)

    def _kind(self, path: Path) -> str | None:
        if self.form is not None:
            return self.form
        name = strip_compression(path.name)
        kind = next((kind for suffix, kind in self.kinds.items() if name.endswith(suffix)), None)
        return None if kind == "parquet" and name != path.name.lower() else kind

    def _file(self, name: str, path: Path, given: str, field: str | None, named: bool) -> SourceFile | None:
        """A file with its kind, decided by content if the name is ambiguous; None if it is to be ignored."""
        size = mtime = 0
        with contextlib.suppress(OSError):  # a dangling link: the reader will report it
            size, mtime = path.stat().st_size, path.stat().st_mtime_ns
        kind = self._kind(path)
        assert kind is not None  # `_expand` leaves out unknown files
        if field is not None and kind == "text":
            raise UserError(f"--input {given}: text files have no fields; remove :{field}, or add --format")
        wanted = field or self.field
        if kind == "json":
            kind = self._json(path, wanted, named, given)
            if kind is None:
                return None
        elif kind == "tsv" and self.form is None:
            kind = tsv_kind(str(path))
            if kind == "tsv-quoted":
                self.notes.append(
                    f"note: {path}: contains CSV quotes and is read with them; --format tsv keeps them as text"
                )
        elif kind == "text":
            self._warn_of_json_lines(path)
        return SourceFile(name, os.path.abspath(path), kind, given, size, mtime, wanted)

    def _json(self, path: Path, field: str, named: bool, given: str) -> str | None:
        """Kind of a `.json` file; None for a single object without the field, unless the user named the file."""
        try:
            layout = json_layout(str(path))
            if layout == "lines":
                return "jsonl"
            if layout != "object" or os.path.getsize(path) > _LARGEST_OBJECT:
                return "json"  # an array; the reader reports whatever else is wrong
            record = _load(path)
        except _CANNOT_READ:
            return "json"
        has_field, text = fields.find(record, field)
        if isinstance(text, str) or (has_field and named):
            return "json"
        if named:
            why = f"a single JSON object with {fields.missing('field', field, fields.names(record))}"
            raise UserError(f"--input {given}: {why}; name its text with --field, or give records as lines or an array")
        self.ignored[f".json without {field!r}"] += 1
        return None

    def _warn_of_json_lines(self, path: Path) -> None:
        """Warn of JSON lines that would be read as text; checks only the first few files of each suffix."""
        suffix = Path(strip_compression(path.name)).suffix
        self._sniffed[suffix] += 1
        if suffix == ".py" or self._sniffed[suffix] > 3:
            return
        with contextlib.suppress(*_CANNOT_READ):
            if json_layout(str(path)) == "lines":
                fix = "add --format jsonl to read its records"
                self.notes.append(f"warning: {path}: is read as text but looks like JSON lines; {fix}")

    def _is_ours(self, path: Path) -> bool:
        """Whether `elas prep` wrote the file or folder, judged by content and not by name alone."""
        if any(self._is_work(parent) for parent in path.parents):
            return True
        if path.is_dir():
            return self._is_work(path)
        for end in _OUTPUTS:
            if path.name.endswith(end):
                prefix = str(path)[: -len(end)]
                if _report_of(Path(f"{prefix}.manifest.json"), "elas-tokens") or self._is_work(Path(f"{prefix}.work")):
                    return True
        if path.name.endswith(".skipped.jsonl"):
            return _is_skip_list(path)
        if path.name in ("tokenizer.model", "tokenizer.vocab"):
            return _report_of(path.with_name("manifest.json"), "elas-tokenizer")
        return path.suffix == ".json" and _report_of(path, "elas-tok")

    def _is_work(self, folder: Path) -> bool:
        if not folder.name.endswith(".work"):
            return False
        if folder not in self._is_work_folder:
            self._is_work_folder[folder] = any((folder / name).is_file() for name in ("plan.json", "lock"))
        return self._is_work_folder[folder]


def unique_names(files: list[SourceFile]) -> list[str]:
    """Unique names for files: duplicates get their leading folders, then their field, then the full path."""
    by_name: dict[str, list[int]] = {}
    for index, file in enumerate(files):
        by_name.setdefault(file.name, []).append(index)
    names = [file.name for file in files]
    for same in by_name.values():
        paths = [files[index].path for index in same]
        if len(set(paths)) > 1 and all(files[index].kind != "hf" for index in same):
            root = os.path.commonpath([os.path.dirname(path) for path in paths])
            for index in same:
                names[index] = Path(files[index].path).relative_to(root).as_posix()
    counts = Counter(names)
    names = [f"{name}:{file.field}" if counts[name] > 1 else name for name, file in zip(names, files)]
    counts = Counter(names)
    return [file.path if counts[name] > 1 else name for name, file in zip(names, files)]


def _split_field(given: str) -> tuple[str, str | None]:
    """`PATH:FIELD` as path and field; a path that exists under its whole name, colons included, has no field."""
    where, colon, field = given.rpartition(":")
    if not colon or not field or given == STDLIB or os.path.lexists(given):
        return given, None
    if os.path.lexists(where):
        return where, field
    if glob.has_magic(where) and not glob.glob(given, recursive=True) and glob.glob(where, recursive=True):
        return where, field
    return given, None


def _load(path: Path) -> dict:
    with open_data(str(path)) as file:
        record = json.loads(file.read(_LARGEST_OBJECT).decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _report_of(path: Path, form: str) -> bool:
    """Whether a file is a manifest whose format starts with `form`, or a command's `--json` report."""
    try:
        if not 0 < path.stat().st_size < _LARGEST_OBJECT:
            return False
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return False
        facts = _load(path)
    except _CANNOT_READ:
        return False
    return str(facts.get("format", "")).startswith(form) or any(keys <= facts.keys() for keys in _REPORT_KEYS)


def _is_skip_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20)
        return not line or set(json.loads(line)) == {"file", "line", "reason"}
    except _CANNOT_READ:
        return False
