"""Encodes documents into the rows and ids of a part; text that spells a special token never yields that token's id."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from multiprocessing.sharedctypes import SynchronizedArray
from typing import ClassVar, Protocol

import numpy as np
from datatrove.data import Document

from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data_prep.loss import Loss
from elas.data_prep.plan import Plan
from elas.data_prep.shards import DOCUMENT
from elas.data_prep.sources import held_out
from elas.errors import UserError

ORDINARY, UNKNOWN, SPECIAL = 0, 1, 2
LONG_CHARS = 1_000_000
"""Longer documents are tokenised in segments of about this length: tokenizers take many times the text's memory."""

Encode = Callable[[str], Sequence[int]]
progress: SynchronizedArray | None = None
"""Bytes of text and documents so far, shared by the processes of one machine (`multiprocessing.Array`); or None."""


class Part(Protocol):
    """Takes what an `Encoder` makes; `elas.data_prep.shards.PartWriter` writes it to files.

    Attributes:
        reasons: documents left out, by reason.
        loss: what the tokenizer loses of the others.
    """

    loss: Loss
    reasons: Counter[str]

    def add(self, side: int, ids: np.ndarray, documents: np.ndarray) -> None:
        """Append documents: their concatenated ids, and their `DOCUMENT` rows."""

    def skip(self, file: int, begin: int, line: int | None, reason: str) -> None:
        """Record a skipped input; `line` counts within the piece, None for the whole file."""


class Encoder:
    """Encodes documents with the tokenizer and settings of a plan.

    Raises:
        UserError: the tokenizer has changed since the plan was made.
    """

    _made: ClassVar[dict] = {}

    def __init__(self, plan: Plan):
        self.settings = plan.settings
        self.sides = len(plan.outputs)
        self.tokenizer = load_tokenizer(plan.settings.tokenizer)
        if self.tokenizer.sha256 != plan.settings.tokenizer_sha256:
            raise UserError(f"tokenizer {plan.settings.tokenizer}: has changed since the work began; restore it")
        self.can_segment = _can_segment(self.tokenizer)
        self._kinds = _kinds_of(self.tokenizer, plan.settings.eod)
        unknown = np.flatnonzero(self._kinds == UNKNOWN)
        self._unknown_token = self.tokenizer.token_of(int(unknown[0])) if len(unknown) else None

    @classmethod
    def of(cls, plan: Plan) -> "Encoder":
        """This process's encoder for a plan, created once."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there already is one worker per core
        key = str(plan.work), tuple(plan.identity.values())
        if key not in cls._made:
            cls._made = {key: cls(plan)}
        return cls._made[key]

    def write(self, batch: list[Document], part: Part) -> None:
        """Tokenise documents and append them to the part."""
        settings = self.settings
        encoded = self._encode([document.text for document in batch])
        begin, end = ([] if i is None else [i] for i in (settings.bos, settings.eod))
        ids = tuple(array("i") for _ in range(self.sides))
        rows: tuple[list, ...] = tuple([] for _ in range(self.sides))
        size = 0
        for document, tokens, found in zip(batch, encoded, self._count_kinds(batch, encoded), strict=True):
            where = document.metadata["where"]
            if found[SPECIAL] or found[UNKNOWN]:
                tokens = self._without_special_ids(document.text, tokens, found, part, where)
                if tokens is None:
                    continue
            if not len(tokens):
                part.skip(**where, reason="yields no tokens")
                continue
            length = len(begin) + len(tokens) + len(end)
            if settings.min_tokens is not None and length < settings.min_tokens:
                part.reasons["too few tokens"] += 1
                continue
            if settings.max_tokens is not None and length > settings.max_tokens:
                part.reasons["too many tokens"] += 1
                continue
            data = document.text.encode()
            size += len(data)
            part.loss.add(self.tokenizer, document.text, data, tokens, int(found[UNKNOWN]), where)
            is_valid = self.sides > 1 and held_out(data, settings.valid_fraction, settings.valid_max_bytes)
            side = 1 if is_valid else 0
            digest = np.frombuffer(blake2b(data, digest_size=16).digest(), "<u8") if settings.deduplicate else (0, 0)
            rows[side].append((length, len(data), where["file"], digest))
            for piece in (begin, tokens, end):
                ids[side].extend(piece)
        for side in range(self.sides):
            part.add(side, np.frombuffer(ids[side], np.int32), np.array(rows[side], dtype=DOCUMENT))
        if progress is not None:
            with progress.get_lock():
                progress[0] += size
                progress[1] += len(batch)

    def _encode(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Ids of every text."""
        if max(map(len, texts)) <= LONG_CHARS or not self.can_segment:
            return self.tokenizer.encode_batch(texts)
        return [self._in_segments(text, self.tokenizer.encode) for text in texts]

    def _in_segments(self, text: str, encode: Encode) -> Sequence[int]:
        if len(text) <= LONG_CHARS or not self.can_segment:
            return encode(text)
        ids = array("i")  # 4 bytes per id; a list takes about 40
        for segment in segments(text):
            ids.extend(encode(segment))
        return ids

    def _count_kinds(self, batch: list[Document], encoded: Sequence[Sequence[int]]) -> np.ndarray:
        """Ids of each kind per document, int64 `[documents, 3]`; raises `UserError` for ids outside the vocabulary."""
        flat = array("i")
        for tokens in encoded:
            flat.extend(tokens)
        ids = np.frombuffer(flat, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.settings.vocab_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            where = f"between {batch[0].id} and {batch[-1].id}"
            why = f"produces id {wrong} {where}, outside its vocabulary of {self.settings.vocab_size}"
            raise UserError(f"tokenizer {self.settings.tokenizer}: {why}; its files do not match each other")
        counts = np.zeros((len(encoded), 3), np.int64)
        kinds = self._kinds[ids]
        places = np.flatnonzero(kinds)
        if len(places):
            ends = np.cumsum([len(tokens) for tokens in encoded])
            np.add.at(counts, (np.searchsorted(ends, places, side="right"), kinds[places]), 1)
        return counts

    def _without_special_ids(
        self, text: str, tokens: Sequence[int], found: np.ndarray, part: Part, where: dict
    ) -> Sequence[int] | None:
        """Ids of the same text without special ids; None if there is no such encoding and the document is skipped.

        Args:
            text: the document's text.
            tokens: the tokenizer's ids of `text`.
            found: counts of each kind in `tokens`; updated in place for the returned ids.
            part: counts the document as respelled or as skipped.
            where: the document's location, for the list of skipped inputs.
        """
        if not found[SPECIAL] and not (self._unknown_token and self._unknown_token in text):
            return tokens  # unknown characters, which no other encoding avoids
        other = None if self._without_special is None else self._in_segments(text, self._without_special)
        if other is not None:
            kinds = np.bincount(self._kinds[np.array(other, np.int64)], minlength=3)
            if not kinds[SPECIAL] and self._same_text(text, tokens, other):
                part.loss.respelled += 1
                found[:] = kinds
                return other
        if not found[SPECIAL]:
            return tokens
        special = next(int(i) for i in tokens if self._kinds[i] == SPECIAL)
        what = "the end-of-document token" if special == self.settings.eod else "a special token"
        name = self.tokenizer.token_of(special)
        why = f"spells {what}, which the tokenizer cannot encode with other pieces ({name})"
        part.skip(**where, reason=why)
        return None

    def _same_text(self, text: str, tokens: Sequence[int], others: Sequence[int]) -> bool:
        """Whether `others` decode to `text`, or to what `tokens` decode to apart from spaces that decoders insert."""
        if self.tokenizer.decode(others) == text:
            return True
        first, second = self.tokenizer.spelling(tokens), self.tokenizer.spelling(others)
        special = {int(i) for i in tokens if self._kinds[i] == SPECIAL}
        if any(not self.tokenizer.spelling([i]).strip() for i in special):  # the lost text may itself be spaces
            return first == second
        return first.replace(" ", "") == second.replace(" ", "")

    @cached_property
    def _without_special(self) -> Encode | None:
        """`encode` without the pieces of special tokens; created on first use, since it takes memory."""
        hidden = set(np.flatnonzero(self._kinds).tolist())
        return self.tokenizer.encoder_without(hidden)


def _kinds_of(tokenizer: Tokenizer, eod: int | None) -> np.ndarray:
    """The kind of every id, uint8 `[vocab_size]`: `ORDINARY`, `UNKNOWN`, or `SPECIAL`, which text must not yield."""
    kinds = np.zeros(tokenizer.vocab_size, np.uint8)
    if tokenizer.unk is not None and tokenizer.unk >= 0:
        kinds[tokenizer.unk] = UNKNOWN
    kinds[sorted(tokenizer.special_ids)] = SPECIAL
    if eod is not None:  # may be an ordinary piece, with --eod-token
        kinds[eod] = SPECIAL
    return kinds


def _can_segment(tokenizer: Tokenizer) -> bool:
    """Whether concatenated ids of two segments decode to both; false if the tokenizer prepends a space to each text."""
    first, second = "one line\n", "  two\n"
    return tokenizer.decode(tokenizer.encode(first) + tokenizer.encode(second)) == first + second


def segments(text: str) -> Iterator[str]:
    """Cut a text into parts of up to `LONG_CHARS` characters: at a line end, else at a blank, else anywhere."""
    start = 0
    while start < len(text):
        end = start + LONG_CHARS
        if end < len(text):
            end = max(text.rfind("\n", start, end), 0) + 1
            if end <= start + 1:
                end = max(text.rfind(" ", start, start + LONG_CHARS), 0)
            if end <= start:
                end = start + LONG_CHARS
        yield text[start:end]
        start = end
