"""Rows to evaluate: stretches of tokens, and the document that each predicted token belongs to.

Legend: D documents of a corpus, n predicted tokens of a row, s `seq_length`.

packed: the documents are concatenated and cut every s tokens. A row holds s + 1 tokens, the first of which is the last
    of the row before, so every token but the corpus's first is predicted exactly once. The last row is shorter.
papers: a row is one document, truncated to s + 1 tokens, as in the papers that ELAS is compared with; the rest is never
    seen, and a document of a single token is left out.
"""

from dataclasses import dataclass

import numpy as np

PROTOCOLS = ("packed", "papers")


@dataclass(frozen=True)
class Documents:
    """Tokens of some documents.

    Attributes:
        name: of the corpus, for messages.
        ids: token ids of the whole corpus, 1-d, any integer dtype; may be a memory map.
        starts: index in `ids` of each document's first token, int64 `[D]`.
        lengths: tokens of each document, int64 `[D]`.
        sizes: bytes of each document's text, int64 `[D]`; None if only the tokens are known.
    """

    name: str
    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)


def rows_of(documents: Documents, protocol: str, seq_length: int, limit: int | None) -> "Rows":
    """The rows to evaluate.

    Args:
        documents: of one corpus.
        protocol: one of `PROTOCOLS`.
        seq_length: s.
        limit: predict this many tokens, in rows spread evenly over the corpus; None for all.
    """
    return (Packed if protocol == "packed" else Truncated)(documents, seq_length, limit)


class Packed:
    """Rows of concatenated documents; see the module."""

    def __init__(self, documents: Documents, seq_length: int, limit: int | None):
        self.documents, self._seq_length = documents, seq_length
        self._ends = np.cumsum(documents.lengths)
        available = max(0, int(self._ends[-1]) - 1 if len(documents) else 0)
        wanted = available if limit is None else min(limit, available)
        count, full = -(-wanted // seq_length), available // seq_length
        self._numbers = np.arange(count) if count > full else np.arange(count) * full // max(1, count)
        self._lengths = np.full(count, seq_length, np.int64)
        if count:
            self._lengths[-1] = wanted - (count - 1) * seq_length

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self) -> np.ndarray:
        """Predicted tokens of each row, int64 `[rows]`."""
        return self._lengths

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 `[n + 1]`, and the document of each of the last n, int64 `[n]`."""
        begin = int(self._numbers[index]) * self._seq_length
        end = begin + int(self._lengths[index]) + 1
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        pieces = []
        for document in range(first, last + 1):
            before = int(self._ends[document] - self.documents.lengths[document])
            start = int(self.documents.starts[document]) - before
            pieces.append(self.documents.ids[start + max(begin, before) : start + min(end, int(self._ends[document]))])
        owners = np.searchsorted(self._ends, np.arange(begin + 1, end), side="right")
        return np.concatenate(pieces).astype(np.int64), owners


class Truncated:
    """Rows of one truncated document each; see the module."""

    def __init__(self, documents: Documents, seq_length: int, limit: int | None):
        self.documents = documents
        usable = np.flatnonzero(documents.lengths > 1)
        lengths = np.minimum(documents.lengths[usable] - 1, seq_length)
        if limit is not None and limit < lengths.sum():
            chosen = _spread_up_to(lengths, limit)
            usable, lengths = usable[chosen], lengths[chosen]
            lengths[-1] -= lengths.sum() - limit
        self._numbers, self._lengths = usable, lengths

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self) -> np.ndarray:
        """Predicted tokens of each row, int64 `[rows]`."""
        return self._lengths

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 `[n + 1]`, and the document of each of the last n, int64 `[n]`."""
        document, length = int(self._numbers[index]), int(self._lengths[index])
        start = int(self.documents.starts[document])
        return self.documents.ids[start : start + length + 1].astype(np.int64), np.full(length, document, np.int64)


Rows = Packed | Truncated


def _spread_up_to(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Indices, ascending and evenly spread, of as few rows as hold `limit` tokens; all but the last are needed."""
    low, high = 1, len(lengths)
    while low < high:  # the sum grows with the number of rows, if not strictly
        middle = (low + high) // 2
        if lengths[np.arange(middle) * len(lengths) // middle].sum() >= limit:
            high = middle
        else:
            low = middle + 1
    while lengths[np.arange(low) * len(lengths) // low].sum() < limit:
        low += 1
    chosen = np.arange(low) * len(lengths) // low
    enough = int(np.searchsorted(np.cumsum(lengths[chosen]), limit)) + 1
    return chosen[:enough]
