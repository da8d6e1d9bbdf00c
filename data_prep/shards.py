"""Files that a task writes to the work folder: its tokens, one row per document, and its skipped inputs.

    parts/00012.train.bin      token ids, as in the final file
    parts/00012.train.docs     one `DOCUMENT` per document, in order
    parts/00012.valid.…        the same for held-out documents, if any are held out
    parts/00012.skipped.jsonl  skipped inputs: file index, begin of the piece, line within the piece, reason
    parts/00012.json           counts and the tokenizer's digest; renamed last, so its presence means a complete part

All files are written under process-specific names and renamed, so two processes may safely run the same task.
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
"""Per document: tokens, UTF-8 bytes, file index, and a 128-bit digest of its text (0 without `deduplicate`)."""


def part_path(work: Path, task: int, end: str) -> Path:
    """Path of one of a task's files, for example with `end` `train.bin`."""
    return work / "parts" / f"{task:05d}.{end}"


class PartWriter:
    """Writes the files of a task.

    Args:
        work: the work folder.
        task: number of the task.
        sides: 1 for training only, 2 with held-out documents.
        dtype: dtype of a token.
        tokenizer_sha256: digest of the tokenizer; `merge` refuses parts of another one.

    Attributes:
        reasons: documents left out, by reason.
        loss: what the tokenizer loses of the others.
        read: documents read, by file index.
    """

    def __init__(self, work: Path, task: int, sides: int, dtype: str, tokenizer_sha256: str):
        self.work, self.task, self.dtype = work, task, np.dtype(dtype)
        self._tokenizer = tokenizer_sha256
        self.loss = Loss()
        self.read: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._suffix = f".{os.getpid()}"
        (work / "parts").mkdir(parents=True, exist_ok=True)
        ends = [f"{side}.{kind}" for side in SIDES[:sides] for kind in ("bin", "docs")] + ["skipped.jsonl"]
        paths = {end: Path(f"{part_path(work, task, end)}{self._suffix}") for end in ends}
        self._files = {end: path.open("wb", 1 << 18) for end, path in paths.items()}

    def add(self, side: int, ids: np.ndarray, documents: np.ndarray) -> None:
        """Append documents: their concatenated ids, and their `DOCUMENT` rows."""
        self._files[f"{SIDES[side]}.bin"].write(ids.astype(self.dtype, copy=False).tobytes())
        self._files[f"{SIDES[side]}.docs"].write(documents.tobytes())

    def skip(self, file: int, begin: int, line: int | None, reason: str) -> None:
        """Record a skipped input; `line` counts within the piece, None for the whole file."""
        self.reasons[kind_of(reason)] += 1
        row = {"file": file, "begin": begin, "line": line, "reason": reason}
        self._files["skipped.jsonl"].write(json.dumps(row).encode() + b"\n")

    def commit(self) -> None:
        """Flush all files and rename them to their final names."""
        for end, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, part_path(self.work, self.task, end))
        counts = part_path(self.work, self.task, "json")
        partial = Path(f"{counts}{self._suffix}")
        facts = {"reasons": dict(sorted(self.reasons.items())), "loss": self.loss.to_json(), "read": self.read}
        partial.write_text(json.dumps(facts | {"tokenizer_sha256": self._tokenizer}))
        partial.replace(counts)  # last: its presence marks the part as complete

    def discard(self) -> None:
        """Remove the temporary files; has no effect after `commit`."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # on a full disk, closing raises the error again
                file.close()
            Path(file.name).unlink(missing_ok=True)
