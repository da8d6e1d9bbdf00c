"""Turns documents into the rows and ids of a part, and keeps the promise that text cannot end its own document."""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import ClassVar

import numpy as np
from datatrove.data import Document

from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data_prep.plan import Plan
from elas.data_prep.shards import DOCUMENT, PartWriter
from elas.data_prep.sources import held_out
from elas.errors import UserError

ORDINARY, UNKNOWN, SPECIAL = 0, 1, 2
LONG_CHARS = 1_000_000
"""Longer documents are tokenised in segments of about this length: tokenizers need many times a text's size at once."""

Encode = Callable[[str], Sequence[int]]
progress = None
"""Bytes of text and documents so far, shared by the processes of one machine (`multiprocessing.Array`), or None."""


class Encoder:
    """The tokenizer of a plan, as its tasks use it.

    Args:
        plan: what to do.

    Raises:
        UserError: the tokenizer has changed since the plan was made.
    """

    _made: ClassVar[dict] = {}

    def __init__(self, plan: Plan):
        self.settings = plan.settings
        self.sides = len(plan.outputs)
        self.tokenizer = load_tokenizer(plan.settings.tokenizer)
        if self.tokenizer.sha256 != plan.settings.tokenizer_sha256:
            raise UserError(f"tokenizer {plan.settings.tokenizer}: has changed since the work began; put it back")
        self.cuts = _can_be_cut(self.tokenizer)
        self._kinds = _kinds_of(self.tokenizer, plan.settings.eod)
        unknown = np.flatnonzero(self._kinds == UNKNOWN)
        self._unknown_token = self.tokenizer.token_of(int(unknown[0])) if len(unknown) else None

    @classmethod
    def of(cls, plan: Plan) -> "Encoder":
        """That of this process, made once."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker a core is parallel enough
        key = str(plan.work), tuple(plan.identity.values())
        if key not in cls._made:
            cls._made = {key: cls(plan)}
        return cls._made[key]

    def write(self, batch: list[Document], part: PartWriter) -> None:
        """Tokenise some documents and append them to the part."""
        settings = self.settings
        encoded = self._encode([document.text for document in batch])
        begin, end = ([] if i is None else [i] for i in (settings.bos, settings.eod))
        ids = tuple(array("i") for _ in range(self.sides))
        rows: tuple[list, ...] = tuple([] for _ in range(self.sides))
        size = 0
        for document, tokens, found in zip(batch, encoded, self._found(batch, encoded), strict=True):
            where = {key: document.metadata[key] for key in ("file", "begin", "line")}
            if found[SPECIAL] or found[UNKNOWN]:
                tokens = self._ordinary(document.text, tokens, found, part, where)
                if tokens is None:
                    continue
            if not len(tokens):
                part.skip(*where.values(), "no token is left of it")
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
            side = self.sides > 1 and held_out(data, settings.valid_fraction, settings.valid_max_bytes)
            digest = np.frombuffer(blake2b(data, digest_size=16).digest(), "<u8") if settings.deduplicate else (0, 0)
            rows[side].append((length, len(data), document.metadata["file"], digest))
            for some in (begin, tokens, end):
                ids[side].extend(some)
        for side in range(self.sides):
            part.add(side, np.frombuffer(ids[side], np.int32), np.array(rows[side], dtype=DOCUMENT))
        if progress is not None:
            with progress.get_lock():
                progress[0] += size
                progress[1] += len(batch)

    def _encode(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Ids of every text."""
        if max(map(len, texts)) <= LONG_CHARS or not self.cuts:
            return self.tokenizer.encode_batch(texts)
        return [self._in_segments(text, self.tokenizer.encode) for text in texts]

    def _in_segments(self, text: str, encode: Encode) -> Sequence[int]:
        if len(text) <= LONG_CHARS or not self.cuts:
            return encode(text)
        ids = array("i")  # 4 bytes an id, where a list of numbers takes 40
        for segment in segments(text):
            ids.extend(encode(segment))
        return ids

    def _found(self, batch: list[Document], encoded: Sequence[Sequence[int]]) -> np.ndarray:
        """For every document how many of its ids are of each kind, (documents, 3); ids must be of the vocabulary."""
        flat = array("i")
        for tokens in encoded:
            flat.extend(tokens)
        ids = np.frombuffer(flat, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.settings.vocab_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            why = f"gives id {wrong} between {batch[0].id} and {batch[-1].id}, outside its {self.settings.vocab_size}"
            raise UserError(f"tokenizer {self.settings.tokenizer}: {why}; its files do not belong together")
        counts = np.zeros((len(encoded), 3), np.int64)
        kinds = self._kinds[ids]
        places = np.flatnonzero(kinds)
        if len(places):
            ends = np.cumsum([len(tokens) for tokens in encoded])
            np.add.at(counts, (np.searchsorted(ends, places, side="right"), kinds[places]), 1)
        return counts

    def _ordinary(
        self, text: str, tokens: Sequence[int], found: np.ndarray, part: PartWriter, where: dict
    ) -> Sequence[int] | None:
        """`tokens`, or other ids of the same text where those hold special ones; None when skipped for want of any.

        Args:
            text: what `tokens` are of.
            tokens: as the tokenizer gave them.
            found: counts of their kinds; brought up to date.
            part: counts the document as respelled, or as skipped.
            where: the document's place, for the list of what was skipped.
        """
        if not found[SPECIAL] and not (self._unknown_token and self._unknown_token in text):
            return tokens  # unknown characters, and nothing to do about them
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
        part.skip(*where.values(), f"spells {what}, for which the tokenizer has no other pieces ({name})")
        return None

    def _same_text(self, text: str, tokens: Sequence[int], others: Sequence[int]) -> bool:
        """Whether `others` spell `text`, or what `tokens` spell, but for spaces, which decoders put around tokens."""
        if self.tokenizer.decode(others) == text:
            return True
        first, second = self.tokenizer.spelling(tokens), self.tokenizer.spelling(others)
        special = {int(i) for i in tokens if self._kinds[i] == SPECIAL}
        if any(not self.tokenizer.spelling([i]).strip() for i in special):  # it may be spaces that were lost
            return first == second
        return first.replace(" ", "") == second.replace(" ", "")

    @cached_property
    def _without_special(self) -> Encode | None:
        """`encode` without the pieces of special tokens; made when a text first asks for it, since it takes memory."""
        hidden = set(np.flatnonzero(self._kinds).tolist())
        return self.tokenizer.encoder_without(hidden)


def _kinds_of(tokenizer: Tokenizer, eod: int | None) -> np.ndarray:
    """The kind of every id: `ORDINARY`, `UNKNOWN` or `SPECIAL`, which no text may give."""
    kinds = np.zeros(tokenizer.vocab_size, np.uint8)
    if tokenizer.unk is not None and tokenizer.unk >= 0:
        kinds[tokenizer.unk] = UNKNOWN
    kinds[sorted(tokenizer.special_ids | ({eod} - {None}))] = SPECIAL
    return kinds


def _can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of two segments, end to end, are the text of both: not where a space is put before every text."""
    first, second = "one line\n", "  two\n"
    return tokenizer.decode(tokenizer.encode(first) + tokenizer.encode(second)) == first + second


def segments(text: str) -> Iterator[str]:
    """Cut a text at line ends, or blanks, or anywhere, into parts of up to `LONG_CHARS` characters."""
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
