"""Read and check Megatron's `.bin/.idx` token files, without importing torch or Megatron-core.

The `.idx` is a header followed by three tables: each sequence's length (int32) and byte offset (int64), and the first
sequence of each document (int64, plus the end). A damaged index makes Megatron hang or read past the end, so all three
are checked. `PREFIX.manifest.json`, written by `elas prep tokenize`, is optional.
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
    """An intact `.bin/.idx` pair: its prefix, and how many documents and tokens it contains."""

    prefix: str
    documents: int
    tokens: int
    dtype: np.dtype

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Memory-mapped: each sequence's length (int32), and each document's first sequence (int64, plus the end)."""
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
        """Tokens of each document in `documents`, which must be ascending: int64, same shape."""
        return self.extents_of(documents)[1]

    def extents_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index in the `.bin` of the first token, and tokens, of each document in `documents`, which must be ascending.

        Returns:
            Two arrays, int64, same shape.
        """
        starts, counts, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for begin, (before, lengths) in zip(range(0, self.documents, _CHUNK), self.document_lengths(_CHUNK)):
            last = int(np.searchsorted(documents, begin + len(lengths)))
            chosen = documents[first:last] - begin
            counts.append(lengths[chosen])
            starts.append(before + (np.cumsum(lengths) - lengths)[chosen])
            first = last
        return np.concatenate(starts), np.concatenate(counts)

    def ids(self) -> np.ndarray:
        """All token ids, memory-mapped."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def sequences_of(self, documents: np.ndarray) -> np.ndarray:
        """Numbers of the sequences of `documents`, int64; ELAS writes one sequence per document."""
        lengths, starts = self._tables()
        if len(lengths) == self.documents and np.array_equal(starts, np.arange(len(starts))):
            return documents
        counts = starts[documents + 1] - starts[documents]
        return np.repeat(starts[documents] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())

    def document_lengths(self, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(tokens before, tokens of each document)`, int64, for up to `chunk` documents at a time."""
        lengths, starts = self._tables()
        before = 0
        for begin in range(0, self.documents, chunk):
            edges = np.asarray(starts[begin : begin + chunk + 1])
            of_sequences = np.concatenate(([0], np.cumsum(lengths[edges[0] : edges[-1]], dtype=np.int64)))
            of_documents = np.diff(of_sequences[edges - edges[0]])
            yield before, of_documents
            before += int(of_documents.sum())

    def content(self, documents: np.ndarray) -> str:
        """Cache key of some documents: a hash of the corpus's fingerprint, all its lengths, and `documents` (int64)."""
        digest = hashlib.sha256(self.fingerprint().encode())
        for table in (*self._tables(), documents):
            for begin in range(0, len(table), _CHUNK):
                digest.update(table[begin : begin + _CHUNK].tobytes())
        return digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """Hash of up to 256 evenly spread stretches of 16 KiB: of all tokens up to 4 MiB, of a sample beyond."""
        size = os.path.getsize(f"{self.prefix}.bin")
        digest = hashlib.sha256()
        with open(f"{self.prefix}.bin", "rb") as file:
            for number in range(_STRETCHES):
                file.seek(max(number * _STRETCH, number * (size - _STRETCH) // (_STRETCHES - 1)))
                digest.update(file.read(_STRETCH))
        return digest.hexdigest()[:16]

    def largest_sampled(self) -> int:
        """Largest id among the first and the last 2²⁰ tokens."""
        tokens = self.ids()
        return int(max(tokens[:_SAMPLED_TOKENS].max(), tokens[-_SAMPLED_TOKENS:].max()))


def check_exists(key: str, prefix: str) -> None:
    """Raise `ConfigError` of the setting `key` unless both files of a `.bin/.idx` pair are there."""
    for end in (".idx", ".bin"):
        if not Path(prefix + end).is_file():
            fix = "give the prefix of a .bin/.idx pair, see elas prep tokenize"
            short = prefix.removesuffix(".bin").removesuffix(".idx")
            if short != prefix and Path(short + end).is_file():
                fix = f"give the prefix without the extension: {short}"
            elif Path(prefix).is_dir():
                inside = sorted(path.with_suffix("") for path in Path(prefix).glob("*.idx"))
                fix = f"give the prefix of a pair in that folder: {inside[0]}" if inside else fix
            raise ConfigError(key, prefix, f"there is no {prefix + end}", fix)


def read_token_files(key: str, prefix: str) -> TokenFiles:
    """Read a `.bin/.idx` pair's tables and check them against each other and the files' sizes.

    Args:
        key: the setting, for messages.
        prefix: path without extension.

    Raises:
        ConfigError: a file is missing, not in Megatron's format, damaged, or without tokens.
    """
    check_exists(key, prefix)
    index = f"{prefix}.idx"
    try:
        with open(index, "rb") as file:
            header = file.read(len(MAGIC) + _HEADER.size)
        size, bin_size = os.path.getsize(index), os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise ConfigError(key, prefix, f"{index}: {error.strerror}", "make it readable") from None
    if len(header) < len(MAGIC) + _HEADER.size or not header.startswith(MAGIC):
        raise ConfigError(key, prefix, f"{index} is not a Megatron index", "write it with elas prep tokenize")
    version, code, sequences, entries = _HEADER.unpack(header[len(MAGIC) :])
    if version != VERSION:
        raise ConfigError(key, prefix, f"{index} has version {version}, not {VERSION}", _AGAIN)
    if code not in TOKEN_TYPES:
        raise ConfigError(key, prefix, f"{index} does not hold integer tokens", _AGAIN)
    if sequences == 0 or entries <= 1:
        raise ConfigError(key, prefix, "the corpus is empty", "tokenise some text into it with elas prep tokenize")
    tables = len(header) + 12 * sequences + 8 * entries
    # Megatron's multimodal format has one more byte per sequence.
    if size not in (tables, tables + sequences):
        raise ConfigError(key, prefix, f"{index} is {'truncated' if size < tables else 'too long'}", _AGAIN)
    dtype = np.dtype(TOKEN_TYPES[code])
    tokens = _sum_lengths(index, len(header), sequences, entries, dtype.itemsize)
    if tokens is None:
        raise ConfigError(key, prefix, f"{index} is damaged", _AGAIN)
    if bin_size != tokens * dtype.itemsize:
        why = "truncated" if bin_size < tokens * dtype.itemsize else "longer than its index says"
        raise ConfigError(key, prefix, f"{prefix}.bin is {why}, the two files do not match", _AGAIN)
    if tokens == 0:
        raise ConfigError(key, prefix, "the corpus is empty", "tokenise some text into it with elas prep tokenize")
    return TokenFiles(prefix, entries - 1, tokens, dtype)


def _sum_lengths(index: str, header: int, sequences: int, entries: int, itemsize: int) -> int | None:
    """Total tokens; None if the tables are inconsistent. Reads in chunks and takes a few seconds per gigabyte."""
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
    """The manifest of a corpus; empty if it is missing or unreadable."""
    try:
        manifest = json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def manifest_vocabulary(prefix: str) -> int | None:
    """Vocabulary size of the corpus's tokenizer, from its manifest; None if unknown."""
    size = read_manifest(prefix).get("vocab_size")
    return size if type(size) is int else None


def manifest_tokenizer(prefix: str) -> str | None:
    """The path that the corpus's tokenizer had when the corpus was made, from its manifest; None if unknown."""
    source = read_manifest(prefix).get("source")
    settings = source.get("settings") if isinstance(source, dict) else None
    path = settings.get("tokenizer") if isinstance(settings, dict) else None
    return path if isinstance(path, str) else None
