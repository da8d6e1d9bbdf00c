"""What a tokenizer loses of the text: ids that stand for anything unknown, and text that comes back changed.

Unknown ids are counted in every document. Decoding everything would cost a good part of the time, so it is done for
the first `CHECKED_CHARS` characters of a task, for one document in `ONE_IN` after them, chosen by its text, and for
every document with a literal U+2581, which SentencePiece takes for a space. Nothing here depends on workers or batches.
"""

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

CHECKED_CHARS, ONE_IN, HEAD_CHARS = 100_000, 64, 100_000
_SHOWN = 24
_COUNTS = ("checked", "changed", "unknown_documents", "unknown_ids", "respelled")


@dataclass
class Loss:
    """What was lost of some documents.

    Args:
        checked: documents that were decoded again (of longer ones their first `HEAD_CHARS` characters).
        changed: of these, how many came back as another text.
        unknown_documents, unknown_ids: documents with ids of the unknown token, and how many of those.
        respelled: documents whose text spells a special token, which ordinary pieces now stand for.
        example: of the first loss `file`, `begin` and `line` as in `elas.data_prep.shards`, `text` and `decoded`.
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
            tokenizer: what it was encoded with.
            text: the document.
            data: its UTF-8.
            ids: its ids, without beginning and end.
            unknown: how many of them are the unknown token's.
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
        changed = decoded not in (text, f" {text}")  # a space before every text is a tokenizer's own business
        if sampled:
            self.checked += 1
            self.changed += changed
        if changed and self.example is None:
            self.example = where | _difference(text, decoded)

    def merge(self, facts: dict) -> None:
        """Add the counts of a later task, `facts` being its `to_json`."""
        for key in _COUNTS:
            setattr(self, key, getattr(self, key) + facts[key])
        self.example = self.example or facts["example"]

    def counts(self) -> dict[str, int]:
        """All but the example."""
        return {key: getattr(self, key) for key in _COUNTS}

    def to_json(self) -> dict:
        """Counts and example."""
        return self.counts() | {"example": self.example}

    def warn(self, documents: int, manifest: Path) -> None:
        """Say on stderr, in one line, what was lost, if anything was; the example has got its `place` by then.

        Args:
            documents: how many were tokenised.
            manifest: where the counts are.
        """
        if not (self.changed or self.unknown_ids):
            return
        parts = []
        if self.unknown_ids:
            found = f"{self.unknown_ids:,} unknown ids in {self.unknown_documents:,} of {documents:,} documents"
            parts.append(f"{found} (text without a piece)")
        if self.changed:
            every = "all" if self.checked == documents else "a sample"
            parts.append(f"{self.changed:,} of {self.checked:,} documents decoded again ({every}) come back changed")
        example = ""
        if self.example is not None:
            example = f"; {self.example['place']}: {self.example['text']!r} comes back as {self.example['decoded']!r}"
        print(
            f"warning: the tokenizer loses text: {', '.join(parts)}{example}; see loss in {manifest}", file=sys.stderr
        )


def _difference(text: str, decoded: str) -> dict[str, str]:
    """The surroundings of the first difference."""
    offset = int(decoded.startswith(" ") and not text.startswith(" "))
    shorter = min(len(text), len(decoded) - offset)
    at = next((i for i in range(shorter) if text[i] != decoded[i + offset]), shorter)
    begin = max(at - _SHOWN // 2, 0)
    return {
        "text": text[begin : begin + _SHOWN],
        "decoded": decoded[begin + offset : begin + offset + _SHOWN],
    }
