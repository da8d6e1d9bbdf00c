"""Write Megatron's `.bin/.idx` token files as a stream: memory does not grow with the number of documents.

`elas.data.token_files` describes the format. Each document is one sequence.
"""

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from elas.data.token_files import MAGIC, TOKEN_TYPES, VERSION

_CHUNK = 1 << 18


def write_index(path: Path, dtype: np.dtype, documents: int, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write an `.idx`.

    Args:
        path: the file; written in place.
        dtype: dtype of a token in the `.bin`.
        documents: number of documents.
        lengths: called twice; returns the tokens of every document in order, as integer arrays of any size.
    """
    code = next(code for code, kind in TOKEN_TYPES.items() if np.dtype(kind) == dtype)
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, documents, documents + 1))
        for part in lengths():
            file.write(part.astype("<i4").tobytes())
        position = 0
        for part in lengths():
            sizes = part.astype("<i8") * dtype.itemsize
            offsets = position + np.concatenate(([0], np.cumsum(sizes)))
            file.write(offsets[:-1].astype("<i8").tobytes())
            position = int(offsets[-1])
        for begin in range(0, documents + 1, _CHUNK):
            file.write(np.arange(begin, min(begin + _CHUNK, documents + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
