"""Count what a tokenizer loses: unknown ids, and documents that decode to a different text.

Unknown ids are counted in every document. Decoding every document would be slow, so only these are decoded: the first
`CHECKED_CHARS` characters of a task, then one document in `ONE_IN`, chosen by its text, and every document with a
literal U+2581, which SentencePiece decodes as a space. The counts do not depend on workers or batches.
"""

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

CHECKED_CHARS, ONE_IN, HEAD_CHARS = 100_000, 64, 100_000
_EXAMPLE_CHARS = 24
_COUNTS = ("checked", "changed", "unknown_documents", "unknown_ids", "respelled")


@dataclass
class Loss:
    """Counts over the documents of a task or a corpus.

    Args:
        checked: documents that were decoded (of longer ones the first `HEAD_CHARS` characters).
        changed: checked documents that decoded to a different text.
        unknown_documents, unknown_ids: documents with unknown ids, and the number of those ids.
        respelled: documents that spell a special token, encoded with ordinary pieces instead.
        example: the first loss: `file`, `begin` and `line` as in `elas.data_prep.shards`, `text` and `decoded`.
    """

    checked: int = 0
    changed: int = 0
    unknown_documents: int = 0
    unknown_ids: int = 0
    respelled: int = 0
    example: dict | None = None
    _chars: int = 0

    def add(self, tokenizer, text: str, data: bytes, ids, unknown: int, where: dict) -> None:
        """Count a document.

        Args:
            tokenizer: the tokenizer that encoded it.
            text: the document.
            data: `text` as UTF-8.
            ids: its ids, without those of beginning and end.
            unknown: how many of `ids` are the unknown id.
            where: `file`, `begin` and `line`, for the example.
        """
        self.unknown_ids += unknown
        self.unknown_documents += unknown > 0
        sampled = self._chars < CHECKED_CHARS or zlib.crc32(data) % ONE_IN == 0 or "\u2581" in text
        self._chars += len(text)
        if not sampled and (not unknown or self.example is not None):
            return
        if len(text) > HEAD_CHARS:
            text = text[:HEAD_CHARS]
            ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        changed = decoded not in (text, f" {text}")  # some tokenizers prepend a space to every text
        if sampled:
            self.checked += 1
            self.changed += changed
        if changed and self.example is None:
            self.example = where | _difference(text, decoded)

    def merge(self, facts: dict) -> None:
        """Add the counts of a later task; `facts` is its `to_json`."""
        for key in _COUNTS:
            setattr(self, key, getattr(self, key) + facts[key])
        self.example = self.example or facts["example"]

    def counts(self) -> dict[str, int]:
        """The counts without the example."""
        return {key: getattr(self, key) for key in _COUNTS}

    def to_json(self) -> dict:
        """Counts and example."""
        return self.counts() | {"example": self.example}

    def warn(self, documents: int, manifest: Path) -> None:
        """Warn on stderr in one line if anything was lost; the example must have its `place` by now.

        Args:
            documents: documents tokenised.
            manifest: path of the manifest that holds the counts.
        """
        if not (self.changed or self.unknown_ids):
            return
        parts = []
        if self.unknown_ids:
            found = f"{self.unknown_ids:,} unknown ids in {self.unknown_documents:,} of {documents:,} documents"
            parts.append(f"{found} (characters outside the vocabulary)")
        if self.changed:
            every = "all" if self.checked == documents else "a sample"
            parts.append(f"{self.changed:,} of {self.checked:,} decoded documents ({every}) differ from their text")
        example = ""
        if self.example is not None:
            example = f"; {self.example['place']}: {self.example['text']!r} decodes to {self.example['decoded']!r}"
        print(
            f"warning: the tokenizer loses text: {', '.join(parts)}{example}; see loss in {manifest}", file=sys.stderr
        )


def in_words(counts: dict[str, int]) -> str:
    """The counts of a `Loss` for people."""
    parts = [f"{counts['changed']:,} of {counts['checked']:,} documents decoded again differ from their text"]
    parts.append(f"{counts['unknown_ids']:,} unknown tokens in {counts['unknown_documents']:,} documents")
    if counts["respelled"]:
        parts.append(f"{counts['respelled']:,} documents spell a special token, which stays text")
    return "; ".join(parts)


def _difference(text: str, decoded: str) -> dict[str, str]:
    """Up to `_EXAMPLE_CHARS` characters around the first difference."""
    offset = int(decoded.startswith(" ") and not text.startswith(" "))
    shorter = min(len(text), len(decoded) - offset)
    at = next((i for i in range(shorter) if text[i] != decoded[i + offset]), shorter)
    begin = max(at - _EXAMPLE_CHARS // 2, 0)
    return {
        "text": text[begin : begin + _EXAMPLE_CHARS],
        "decoded": decoded[begin + offset : begin + offset + _EXAMPLE_CHARS],
    }
