"""What a task leaves in the work folder: its tokens, a row a document, and what it left out.

    parts/00012.train.bin    token ids, as they will lie in the final file
    parts/00012.train.docs   a `DOCUMENT` a document, in order
    parts/00012.valid.…      the same of held-out documents, where there are any to hold out
    parts/00012.skipped.jsonl  what could not be read: index of the file, begin of the piece, line within it, reason
    parts/00012.json         counts, and what tokenizer it was; put in place last, so that where it is the rest is whole

All are written under names of their own and renamed, so two processes at the same task do no harm.
"""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from elas.data_prep.loss import Loss
from elas.data_prep.sources import kind_of

SIDES = ("train", "valid")
DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("file", "<u4"), ("digest", "<u8", 2)])
"""Of a document: its tokens, UTF-8 bytes, index of its file, and a digest of its text (0 unless duplicates matter)."""


def part_path(work: Path, task: int, end: str) -> Path:
    """One of a task's files."""
    return work / "parts" / f"{task:05d}.{end}"


class PartWriter:
    """The files of a task in the making.

    Args:
        work: the work folder.
        task: number of the task.
        sides: how many of `SIDES` there are.
        dtype: of a token.
        tokenizer_sha256: what the ids are of; `merge` puts no others together.

    Attributes:
        reasons: how many documents were left out, by reason.
        loss: what the tokenizer loses of the others.
        read: how many documents were read, by index of their file.
    """

    def __init__(self, work: Path, task: int, sides: int, dtype: str, tokenizer_sha256: str):
        self.work, self.task, self.dtype = work, task, np.dtype(dtype)
        self._tokenizer = tokenizer_sha256
        self.loss = Loss()
        self.read: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._mine = f".{os.getpid()}"
        (work / "parts").mkdir(parents=True, exist_ok=True)
        ends = [f"{side}.{kind}" for side in SIDES[:sides] for kind in ("bin", "docs")] + ["skipped.jsonl"]
        paths = {end: Path(f"{part_path(work, task, end)}{self._mine}") for end in ends}
        self._files = {end: path.open("wb", 1 << 18) for end, path in paths.items()}

    def add(self, side: int, ids: np.ndarray, documents: np.ndarray) -> None:
        """Append documents: their ids end to end, and their `DOCUMENT` rows."""
        self._files[f"{SIDES[side]}.bin"].write(ids.astype(self.dtype, copy=False).tobytes())
        self._files[f"{SIDES[side]}.docs"].write(documents.tobytes())

    def skip(self, file: int, begin: int, number: int | None, reason: str) -> None:
        """Note an input that is no document."""
        self.reasons[kind_of(reason)] += 1
        row = {"file": file, "begin": begin, "line": number, "reason": reason}
        self._files["skipped.jsonl"].write(json.dumps(row).encode() + b"\n")

    def commit(self) -> None:
        """Put everything in place."""
        for end, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, part_path(self.work, self.task, end))
        counts = part_path(self.work, self.task, "json")
        partial = Path(f"{counts}{self._mine}")
        facts = {"reasons": dict(sorted(self.reasons.items())), "loss": self.loss.to_json(), "read": self.read}
        partial.write_text(json.dumps(facts | {"tokenizer_sha256": self._tokenizer}))
        partial.replace(counts)

    def discard(self) -> None:
        """Remove what is not in place; harmless after `commit`."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, said again on closing
                file.close()
            Path(file.name).unlink(missing_ok=True)
