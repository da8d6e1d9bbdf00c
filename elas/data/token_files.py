"""Megatron's `.bin/.idx` token files, read without torch or Megatron-core: what they hold, and whether they are whole.

The `.idx` is a header, then three tables: each sequence's length (int32) and byte offset (int64), and where documents
begin (int64, with the end). A damaged one makes Megatron hang or read past the end, so all three are checked.
`PREFIX.manifest.json`, which `elas prep tokenize` writes, is optional.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elas.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # Megatron's codes
_HEADER = struct.Struct("<QBQQ")
_CHUNK = 1 << 20
_STRETCHES, _STRETCH = 256, 1 << 14
_SAMPLED_TOKENS = 1 << 20
_AGAIN = "write it again with elas prep tokenize"


@dataclass(frozen=True)
class TokenFiles:
    """A `.bin/.idx` pair: its prefix, and how many documents and tokens it holds."""

    prefix: str
    documents: int
    tokens: int
    dtype: np.dtype

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Each sequence's length (int32), and the sequence each document begins at (int64, with the end), mapped."""
        with open(f"{self.prefix}.idx", "rb") as file:
            sequences, entries = _HEADER.unpack(file.read(len(MAGIC) + _HEADER.size)[len(MAGIC) :])[2:]
        header = len(MAGIC) + _HEADER.size
        lengths = np.memmap(f"{self.prefix}.idx", "<i4", "r", header, (sequences,))
        return lengths, np.memmap(f"{self.prefix}.idx", "<i8", "r", header + 12 * sequences, (entries,))

    def tokens_of(self, first: int, last: int) -> int:
        """Tokens in documents [first, last)."""
        lengths, starts = self._tables()
        return int(lengths[int(starts[first]) : int(starts[last])].sum(dtype=np.int64))

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of some documents, by ascending numbers: int64, as many."""
        found, first = [np.zeros(0, dtype=np.int64)], 0
        for begin, (_, lengths) in zip(range(0, self.documents, _CHUNK), self.document_lengths(_CHUNK)):
            last = int(np.searchsorted(documents, begin + len(lengths)))
            found.append(lengths[documents[first:last] - begin])
            first = last
        return np.concatenate(found)

    def sequences_of(self, documents: np.ndarray) -> np.ndarray:
        """Numbers of the sequences that some documents consist of, int64; elas writes one sequence a document."""
        lengths, starts = self._tables()
        if len(lengths) == self.documents and np.array_equal(starts, np.arange(len(starts))):
            return documents
        counts = starts[documents + 1] - starts[documents]
        return np.repeat(starts[documents] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())

    def document_lengths(self, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
        """Tokens of every document, int64, up to `chunk` documents at a time, each with the tokens before them."""
        lengths, starts = self._tables()
        before = 0
        for begin in range(0, self.documents, chunk):
            edges = np.asarray(starts[begin : begin + chunk + 1])
            of_sequences = np.concatenate(([0], np.cumsum(lengths[edges[0] : edges[-1]], dtype=np.int64)))
            of_documents = np.diff(of_sequences[edges - edges[0]])
            yield before, of_documents
            before += int(of_documents.sum())

    def content(self, documents: np.ndarray) -> str:
        """Key of some documents in caches: the corpus's fingerprint, every length in it, and their numbers (int64)."""
        digest = hashlib.sha256(self.fingerprint().encode())
        for table in (*self._tables(), documents):
            for begin in range(0, len(table), _CHUNK):
                digest.update(table[begin : begin + _CHUNK].tobytes())
        return digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """Of the tokens in up to 256 stretches of 16 KiB, evenly spread: all of them up to 4 MiB, a sample beyond."""
        size = os.path.getsize(f"{self.prefix}.bin")
        digest = hashlib.sha256()
        with open(f"{self.prefix}.bin", "rb") as file:
            for number in range(_STRETCHES):
                file.seek(max(number * _STRETCH, number * (size - _STRETCH) // (_STRETCHES - 1)))
                digest.update(file.read(_STRETCH))
        return digest.hexdigest()[:16]

    def largest_sampled(self) -> int:
        """Largest token id among up to a million from the beginning and as many from the end."""
        tokens = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")
        return int(max(tokens[:_SAMPLED_TOKENS].max(), tokens[-_SAMPLED_TOKENS:].max()))


def read_token_files(key: str, prefix: str) -> TokenFiles:
    """Read a `.bin/.idx` pair's tables and check them against each other and the files' sizes.

    Args:
        key: the setting, for messages.
        prefix: path without ending.

    Raises:
        ConfigError: a file is missing, is not Megatron's, is not whole, or holds no tokens.
    """
    for end in (".idx", ".bin"):
        if not Path(prefix + end).is_file():
            fix = "give the prefix of a .bin/.idx pair, see elas prep tokenize"
            short = prefix.removesuffix(".bin").removesuffix(".idx")
            if short != prefix and Path(short + end).is_file():
                fix = f"give the prefix, without its ending: {short}"
            elif Path(prefix).is_dir():
                inside = sorted(path.with_suffix("") for path in Path(prefix).glob("*.idx"))
                fix = f"give the prefix of a pair in that folder: {inside[0]}" if inside else fix
            raise ConfigError(key, prefix, f"there is no {prefix + end}", fix)
    index = f"{prefix}.idx"
    try:
        with open(index, "rb") as file:
            header = file.read(len(MAGIC) + _HEADER.size)
        size, bin_size = os.path.getsize(index), os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise ConfigError(key, prefix, f"{index}: {error.strerror}", "make it readable") from None
    if len(header) < len(MAGIC) + _HEADER.size or not header.startswith(MAGIC):
        raise ConfigError(key, prefix, f"{index} is no Megatron index", "write it with elas prep tokenize")
    version, code, sequences, entries = _HEADER.unpack(header[len(MAGIC) :])
    if version != VERSION:
        raise ConfigError(key, prefix, f"{index} has version {version}, not {VERSION}", _AGAIN)
    if code not in TOKEN_TYPES:
        raise ConfigError(key, prefix, f"{index} holds no integer tokens", _AGAIN)
    if sequences == 0 or entries <= 1:
        raise ConfigError(key, prefix, "the corpus is empty", "tokenise some text into it with elas prep tokenize")
    tables = len(header) + 12 * sequences + 8 * entries
    # One byte more for each sequence is Megatron's multimodal form.
    if size not in (tables, tables + sequences):
        raise ConfigError(key, prefix, f"{index} is {'cut short' if size < tables else 'too long'}", _AGAIN)
    dtype = np.dtype(TOKEN_TYPES[code])
    tokens = _sum_lengths(index, len(header), sequences, entries, dtype.itemsize)
    if tokens is None:
        raise ConfigError(key, prefix, f"{index} is damaged", _AGAIN)
    if bin_size != tokens * dtype.itemsize:
        why = "cut short" if bin_size < tokens * dtype.itemsize else "longer than its index says"
        raise ConfigError(key, prefix, f"{prefix}.bin is {why}", "the two files do not belong together; " + _AGAIN)
    if tokens == 0:
        raise ConfigError(key, prefix, "the corpus is empty", "tokenise some text into it with elas prep tokenize")
    return TokenFiles(prefix, entries - 1, tokens, dtype)


def _sum_lengths(index: str, header: int, sequences: int, entries: int, itemsize: int) -> int | None:
    """Tokens in all; None when the tables contradict themselves. Reads a chunk at a time, a few seconds a gigabyte."""
    lengths = np.memmap(index, "<i4", "r", header, (sequences,))
    offsets = np.memmap(index, "<i8", "r", header + 4 * sequences, (sequences,))
    documents = np.memmap(index, "<i8", "r", header + 12 * sequences, (entries,))
    total = 0
    for begin in range(0, sequences, _CHUNK):
        length = lengths[begin : begin + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(length)
        expected = np.concatenate(([total], ends[:-1])) * itemsize
        if (length < 0).any() or not np.array_equal(offsets[begin : begin + _CHUNK], expected):
            return None
        total = int(ends[-1])
    if documents[0] != 0 or documents[-1] != sequences:
        return None
    for begin in range(0, entries - 1, _CHUNK):
        if (np.diff(documents[begin : begin + _CHUNK + 1]) < 0).any():
            return None
    return total


def read_manifest(prefix: str) -> dict:
    """What `elas prep tokenize` wrote beside a corpus; empty without a manifest that can be read."""
    try:
        manifest = json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def manifest_vocabulary(prefix: str) -> int | None:
    """Size of the vocabulary the corpus was written with, from its manifest; None where that does not say it."""
    size = read_manifest(prefix).get("vocab_size")
    return size if type(size) is int else None
