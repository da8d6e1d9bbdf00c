"""Merge the parts of all tasks as a stream into `.bin`, `.idx`, the manifest and the list of skipped inputs.

Parts are concatenated in task order, so the result does not depend on which worker ran a task or when. Files are
written under temporary names and renamed when all are complete, manifests last: an existing manifest always matches the
files beside it.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from elas.data_prep.duplicates import find_duplicates
from elas.data_prep.held_out import held_out_share, held_out_warning
from elas.data_prep.indexed_writer import write_index
from elas.data_prep.loss import Loss
from elas.data_prep.parquet import row_groups
from elas.data_prep.plan import Plan
from elas.data_prep.shards import DOCUMENT, SIDES, part_path
from elas.data_prep.sources import SkipLog, place
from elas.data_prep.unread import TooMuchUnread, Unread
from elas.errors import ConfigError, Failure, UserError
from elas.files import write_json

_COPY = 1 << 22
_ROWS = 1 << 16


def merge(plan: Plan) -> dict:
    """Write the results of a plan whose tasks are all finished.

    Returns:
        `documents`, `tokens` and `bytes_in` (UTF-8) of the training side, and with prefix `valid_` of the held-out
        side; `held_out` (its shares), `skipped`, `skip_reasons`, and the settings stored in the manifests.

    Raises:
        Failure: a part is missing or damaged.
        UserError: one of the sides has no documents.
        TooMuchUnread: too much of the corpus could not be read.
    """
    reasons, loss = _counts(plan)
    kept: list[np.ndarray | None] = [None] * len(plan.outputs)
    if plan.settings.deduplicate:
        for side in range(len(plan.outputs)):
            kept[side], copies = find_duplicates(plan, SIDES[side])
            if copies:
                reasons["duplicate"] += copies
    sides = [_Side(plan, side, kept[side]) for side in range(len(plan.outputs))]
    _check_not_empty(plan, sides, reasons)
    unread = Unread(plan)
    try:
        unread.check()
    except TooMuchUnread:
        _write_skipped(plan).replace(plan.work / "skipped.jsonl")
        raise
    common = {"skipped": reasons.total(), "skip_reasons": dict(sorted(reasons.items()))}
    common["unread_share"] = round(unread.share(), 6)
    settings = asdict(plan.settings)
    common |= {k: settings[k] for k in ("dtype", "vocab_size", "tokenizer_sha256", "eod", "bos")}
    partial = [side.write() for side in sides]
    skipped = _write_skipped(plan)
    for side in sides:  # an old manifest must not describe the new files
        Path(f"{side.prefix}.manifest.json").unlink(missing_ok=True)
    for paths in partial:
        for path, target in paths:
            path.replace(target)
    skipped.replace(f"{plan.outputs[0]}.skipped.jsonl")
    for side in sides:
        source = plan.source | {"settings": settings, "sources": side.sources(), "files": side.files_read()}
        manifest = {"format": "elas-tokens-2", "plan": plan.identity, **side.facts(), **common, "source": source}
        manifest["loss"] = loss.to_json()
        write_json(Path(f"{side.prefix}.manifest.json"), manifest)
    facts = common | {"loss": loss.counts()}
    for side, prefix in zip(sides, ("", "valid_")):
        facts |= {prefix + key: side.counts[key] for key in ("documents", "tokens", "bytes_in")}
    facts |= held_out_share(facts, plan.settings.valid_fraction)
    if warning := held_out_warning(facts):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    unread.warn()
    loss.warn(sum(side.counts["documents"] for side in sides), Path(f"{sides[0].prefix}.manifest.json"))
    return facts


class _Side:
    """The training or the held-out documents of a plan."""

    def __init__(self, plan: Plan, side: int, kept: np.ndarray | None):
        self.plan, self.name, self.kept = plan, SIDES[side], kept
        self.prefix = Path(plan.outputs[side])
        self.dtype = np.dtype(plan.settings.dtype)
        self.counts = Counter(documents=0, tokens=0, bytes_in=0)
        self._by_file = np.zeros((len(plan.files), 3), np.int64)
        self._sums: dict[str, dict] = {}
        for rows in self._rows():
            self._by_file[:, 0] += np.bincount(rows["file"], minlength=len(plan.files))
            for column, key in ((1, "tokens"), (2, "bytes")):
                np.add.at(self._by_file[:, column], rows["file"], rows[key].astype(np.int64))
        self.counts["documents"], self.counts["tokens"], self.counts["bytes_in"] = (
            int(n) for n in self._by_file.sum(0)
        )

    def write(self) -> list[tuple[Path, Path]]:
        """Write `.bin` and `.idx` under temporary names; returns `(temporary, final)` paths."""
        ends = (".bin", ".idx")
        mine = {end: self.plan.work / f"{self.name}{end}.{os.getpid()}" for end in ends}
        with open(mine[".bin"], "wb") as file:
            digest = hashlib.sha256()
            for data in self._tokens():
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._sums[".bin"] = {"bytes": mine[".bin"].stat().st_size, "sha256": digest.hexdigest()}
        expected = self.counts["tokens"] * self.dtype.itemsize
        if self._sums[".bin"]["bytes"] != expected:
            raise Failure(f"{self.plan.work}: parts are damaged; start over with --overwrite")
        write_index(mine[".idx"], self.dtype, self.counts["documents"], lambda: (r["tokens"] for r in self._rows()))
        with open(mine[".idx"], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._sums[".idx"] = {"bytes": mine[".idx"].stat().st_size, "sha256": digest}
        return [(mine[end], Path(f"{self.prefix}{end}")) for end in ends]

    def facts(self) -> dict:
        """Counts and checksums, for the manifest."""
        return dict(self.counts) | {"files": {self.prefix.name + end: facts for end, facts in self._sums.items()}}

    def sources(self) -> dict[str, dict]:
        """`files`, `documents`, `tokens` and `bytes_in` by input."""
        found: dict[str, Counter] = {}
        for file, counts in zip(self.plan.files, self._by_file.tolist()):
            found.setdefault(file.source, Counter(files=0)).update(
                files=1, documents=counts[0], tokens=counts[1], bytes_in=counts[2]
            )
        return {source: dict(counts) for source, counts in found.items()}

    def files_read(self) -> list[list]:
        """`[name, bytes on disk, documents, tokens]` of every file."""
        rows = zip(self.plan.files, self._by_file.tolist())
        return [[file.name, file.size, counts[0], counts[1]] for file, counts in rows]

    def _rows(self) -> Iterator[np.ndarray]:
        """Yield the `DOCUMENT` rows of kept documents in chunks."""
        for rows, keep in self._chunks():
            yield rows if keep is None else rows[keep]

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        done = 0
        for task in range(len(self.plan.tasks)):
            with open(part_path(self.plan.work, task, f"{self.name}.docs"), "rb") as file:
                while data := file.read(_ROWS * DOCUMENT.itemsize):
                    rows = np.frombuffer(data, DOCUMENT)
                    keep = None if self.kept is None else self.kept[done : done + len(rows)]
                    done += len(rows)
                    yield rows, keep

    def _tokens(self) -> Iterator[bytes]:
        if self.kept is None:
            for task in range(len(self.plan.tasks)):
                with open(part_path(self.plan.work, task, f"{self.name}.bin"), "rb") as file:
                    while data := file.read(_COPY):
                        yield data
            return
        done = 0
        for task in range(len(self.plan.tasks)):
            bin_path, docs_path = (part_path(self.plan.work, task, f"{self.name}.{end}") for end in ("bin", "docs"))
            with open(bin_path, "rb") as tokens, open(docs_path, "rb") as docs:
                while data := docs.read(_ROWS * DOCUMENT.itemsize):
                    rows = np.frombuffer(data, DOCUMENT)
                    keep = self.kept[done : done + len(rows)]
                    done += len(rows)
                    yield from _selected(tokens, rows["tokens"].astype(np.int64) * self.dtype.itemsize, keep)


def _selected(file, sizes: np.ndarray, keep: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of the kept documents from the file's current position, one run of equal `keep` at a time."""
    edges = np.flatnonzero(np.diff(keep.astype(np.int8))) + 1
    for run in np.split(np.arange(len(keep)), edges):
        left = int(sizes[run].sum())
        if not keep[run[0]]:
            file.seek(left, os.SEEK_CUR)
            continue
        while left:
            data = file.read(min(left, _COPY))
            left -= len(data)
            yield data


def _counts(plan: Plan) -> tuple[Counter, Loss]:
    """Documents left out by reason, and what the tokenizer lost of the others, summed over all tasks."""
    reasons, loss = Counter(), Loss()
    for task in range(len(plan.tasks)):
        try:
            facts = json.loads(part_path(plan.work, task, "json").read_text())
        except FileNotFoundError:
            raise Failure(f"task {task} of {len(plan.tasks)} is not done; run the same command again") from None
        if facts["tokenizer_sha256"] != plan.settings.tokenizer_sha256:
            why = f"task {task} of {len(plan.tasks)} used another tokenizer than the plan's"
            raise Failure(f"{plan.work}: {why}; start over with --overwrite")
        reasons.update(facts["reasons"])
        loss.merge(facts["loss"])
    if loss.example is not None:
        file, begin = plan.files[loss.example.pop("file")], loss.example.pop("begin")
        line = loss.example.pop("line")
        line = None if line is None else line + _Lines(plan).before(plan.files.index(file), begin)
        loss.example = {"place": place(file, line), **loss.example}
    return reasons, loss


def _write_skipped(plan: Plan) -> Path:
    """Write the list of skipped inputs, with line numbers from the start of each file; prints the first few."""
    path = plan.work / f"skipped.jsonl.{os.getpid()}"
    log, lines = SkipLog(), _Lines(plan)
    with open(path, "w", encoding="utf-8") as out:
        for task in range(len(plan.tasks)):
            with open(part_path(plan.work, task, "skipped.jsonl"), encoding="utf-8") as rows:
                for row in map(json.loads, rows):
                    file, number = plan.files[row["file"]], row["line"]
                    if number is not None:
                        number += lines.before(row["file"], row["begin"])
                    out.write(json.dumps({"file": file.name, "line": number, "reason": row["reason"]}) + "\n")
                    log.add(row["reason"], place(file, number))
        out.flush()
        os.fsync(out.fileno())
    return path


class _Lines:
    """Counts the lines or rows before a piece of a file; reads a file again only for pieces with skipped inputs."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._known = (-1, 0, 0)  # file, byte or row group, lines before it

    def before(self, index: int, begin: int) -> int:
        """Lines of file `index` before the first that starts at or after byte (or row group, or shard) `begin`."""
        file = self.plan.files[index]
        if begin == 0 or file.kind == "hf":
            return 0
        if file.kind == "parquet":
            return sum(rows for _, rows in (row_groups(file.path) or [])[:begin])
        known, position, lines = self._known
        if known != index or position > begin:
            position = lines = 0
        with open(file.path, "rb") as data:
            data.seek(position)
            while position < begin:
                chunk = data.read(min(_COPY, begin - position))
                if not chunk:
                    break
                position += len(chunk)
                lines += chunk.count(b"\n")
            self._known = (index, position, lines)
            data.seek(begin - 1)
            return lines + (data.read(1) != b"\n")


def _check_not_empty(plan: Plan, sides: list[_Side], reasons: Counter) -> None:
    skipped = ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none"
    if not any(side.counts["documents"] for side in sides):
        _write_skipped(plan).unlink()
        fix = "check the inputs and --field"
        if any(reason.startswith("not UTF-8") for reason in reasons):
            fix += "; convert text in another encoding: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        raise UserError(f"--input: no document contains text (skipped: {skipped}); {fix}")
    for side in sides:
        if not side.counts["documents"]:
            why = f"leaves no documents for {side.prefix}"
            fix = "give another fraction or more documents"
            raise ConfigError("--valid-fraction", plan.settings.valid_fraction, why, fix)
    if sys.byteorder != "little":
        raise Failure("token files are little-endian, but this machine is big-endian")
