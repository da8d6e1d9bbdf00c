"""Writes Megatron token files: `PREFIX.bin`, `PREFIX.idx` and, last, `PREFIX.manifest.json`.

Everything is written under temporary names beside the target and renamed when whole. The manifest is removed before
and put in place after the other two: where there is a manifest, the files belong together.
"""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from elas.cli import write_json


class IndexedWriter:
    """Token files in the making; nothing appears at `prefix` before `commit`.

    Args:
        prefix: path without `.bin` and `.idx`; its folder exists.
        dtype: numpy dtype of a token.
    """

    def __init__(self, prefix: Path, dtype: type):
        self.prefix, self.dtype = Path(prefix), dtype
        self.documents = self.tokens = self.bytes_in = 0
        stem = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}")
        self._partial = {end: Path(f"{stem}{end}") for end in (".bin", ".idx")}
        self._builder = None

    def add(self, ids: np.ndarray, bytes_in: int) -> None:
        """Append one document: its token ids, shape [tokens], and the bytes of text that it came from."""
        if self._builder is None:
            # Made with the first token, so that an empty corpus is found without waiting for torch and Megatron.
            self._builder = _indexed_dataset().IndexedDatasetBuilder(str(self._partial[".bin"]), dtype=self.dtype)
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.bytes_in += bytes_in

    def finalize(self) -> dict:
        """Close the temporary files.

        Returns:
            Their counts, and the size in bytes and SHA-256 of `.bin` and `.idx`.
        """
        self._builder.finalize(str(self._partial[".idx"]))
        facts = {"documents": self.documents, "tokens": self.tokens, "bytes_in": self.bytes_in, "files": {}}
        for end, path in self._partial.items():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            facts["files"][self.prefix.name + end] = {"bytes": path.stat().st_size, "sha256": digest}
        return facts

    def commit(self, manifest: dict) -> None:
        """Put the finalized files and their manifest in place."""
        target = Path(f"{self.prefix}.manifest.json")
        target.unlink(missing_ok=True)
        for end, path in self._partial.items():
            path.replace(f"{self.prefix}{end}")
        write_json(target, manifest)

    def discard(self) -> None:
        """Remove what is temporary; harmless after `commit`."""
        if self._builder is not None:
            self._builder.data_file.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)


def _indexed_dataset():
    """Megatron's module, without the warnings that its import prints where there is no Transformer Engine or Apex."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
