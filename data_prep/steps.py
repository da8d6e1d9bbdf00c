"""The steps of a task, as datatrove's pipeline runs them: read → filter → tokenise and write.

Each looks up the plan by its work folder, so that a step that is sent to another process or machine is a few words.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from elas.data_prep.plan import Plan, load_plan
from elas.data_prep.quality import make_filters, rejection
from elas.data_prep.readers import read_piece
from elas.data_prep.shards import DOCUMENT, PartWriter
from elas.data_prep.sources import held_out, place
from elas.data_prep.tokenizer import load_tokenizer
from elas.errors import UserError

BATCH_CHARS, BATCH_DOCUMENTS = 1_000_000, 1000
LONG_CHARS = 1_000_000
"""Longer documents are tokenised in segments of about this length: tokenizers need many times a text's size at once."""

progress = None
"""Bytes of text and documents so far, shared by the processes of one machine (`multiprocessing.Array`), or None."""


class ReadTask(PipelineStep):
    """Reads the pieces of one task; `run` yields `Document`s whose metadata hold the index of their file.

    Args:
        work: the work folder, where the plan lies.
    """

    type, name = "reader", "pieces of the plan"

    def __init__(self, work: str):
        super().__init__()
        self.work = work
        self.part: PartWriter | None = None

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents of task `rank`."""
        plan = load_plan(self.work)
        for index, begin, end in plan.tasks[rank]:
            file = plan.files[index]

            def skip(reason: str, number: int | None, where=(index, begin)) -> None:
                if self.part is not None:
                    self.part.skip(*where, number, reason)

            file.check_unchanged()
            for number, text in read_piece(file.path, file.kind, plan.settings.field, (begin, end), skip):
                line = None if file.kind == "text" else number
                yield Document(text, place(file, number), metadata={"file": index, "begin": begin, "line": line})
            file.check_unchanged()


class WriteTask(PipelineStep):
    """Filters, tokenises and writes the documents of one task.

    Args:
        reader: the step before it, which tells the same part what it skipped.
    """

    type, name = "tokenizer", "Megatron part"

    def __init__(self, reader: ReadTask):
        super().__init__()
        self.reader = reader

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the part of task `rank`."""
        plan = load_plan(self.reader.work)
        part = PartWriter(plan.work, rank, len(plan.outputs), plan.settings.dtype)
        self.reader.part = part
        try:
            encode = _Encoder.of(plan)
            for batch in _batches(self._kept(plan, data, part)):
                encode.write(batch, part)
                self.stat_update("documents", value=len(batch), unit="batch")
            part.commit()
        finally:
            part.discard()

    def _kept(self, plan: Plan, data: Iterator[Document], part: PartWriter) -> Iterator[Document]:
        """The documents that are wanted; the others are counted."""
        settings = plan.settings
        filters = make_filters(settings.filters)
        for document in data:
            size = len(document.text)
            if not size or document.text.isspace():
                part.skip(*(document.metadata[key] for key in ("file", "begin", "line")), "empty")
            elif settings.min_chars is not None and size < settings.min_chars:
                part.reasons["too few characters"] += 1
            elif settings.max_chars is not None and size > settings.max_chars:
                part.reasons["too many characters"] += 1
            elif (reason := rejection(filters, document)) is not None:
                part.reasons[reason] += 1
            else:
                yield document


class _Encoder:
    """Turns documents into the rows and ids of a part."""

    _made: ClassVar[dict] = {}

    def __init__(self, plan: Plan):
        self.settings = plan.settings
        self.sides = len(plan.outputs)
        self.tokenizer = load_tokenizer(plan.settings.tokenizer)
        if self.tokenizer.sha256 != plan.settings.tokenizer_sha256:
            raise UserError(f"tokenizer {plan.settings.tokenizer}: has changed since the work began; put it back")
        self.cuts = _can_be_cut(self.tokenizer)

    @classmethod
    def of(cls, plan: Plan) -> "_Encoder":
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
        ends = [] if settings.eod is None else [settings.eod]
        ids = tuple(array("i") for _ in range(self.sides))
        rows: tuple[list, ...] = tuple([] for _ in range(self.sides))
        size = 0
        for document, tokens in zip(batch, encoded, strict=True):
            length = len(tokens) + len(ends)
            if settings.min_tokens is not None and length < settings.min_tokens:
                part.reasons["too few tokens"] += 1
                continue
            if settings.max_tokens is not None and length > settings.max_tokens:
                part.reasons["too many tokens"] += 1
                continue
            data = document.text.encode()
            size += len(data)
            side = self.sides > 1 and held_out(data, settings.valid_fraction)
            digest = np.frombuffer(blake2b(data, digest_size=16).digest(), "<u8") if settings.deduplicate else (0, 0)
            rows[side].append((length, len(data), document.metadata["file"], digest))
            ids[side].extend(tokens)
            ids[side].extend(ends)
        for side in range(self.sides):
            values = np.frombuffer(ids[side], np.int32)
            self._check(values, batch)
            part.add(side, values, np.array(rows[side], dtype=DOCUMENT))
        if progress is not None:
            with progress.get_lock():
                progress[0] += size
                progress[1] += len(batch)

    def _encode(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Ids of every text."""
        if max(map(len, texts)) <= LONG_CHARS or not self.cuts:
            return self.tokenizer.encode_batch(texts)
        return [self._encode_in_segments(text) for text in texts]

    def _encode_in_segments(self, text: str) -> array:
        ids = array("i")  # 4 bytes an id, where a list of numbers takes 40
        for segment in segments(text):
            ids.extend(self.tokenizer.encode(segment))
        return ids

    def _check(self, ids: np.ndarray, batch: list[Document]) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.settings.vocab_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            why = f"gives id {wrong} between {batch[0].id} and {batch[-1].id}, outside its {self.settings.vocab_size}"
            raise UserError(f"tokenizer {self.settings.tokenizer}: {why}; its files do not belong together")


def _can_be_cut(tokenizer) -> bool:
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


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare(plan: Plan) -> None:
    """Load the tokenizer, for processes that will be forked from this one."""
    _Encoder.of(plan)


def pipeline(work: Path) -> list[PipelineStep]:
    """All steps of a task."""
    reader = ReadTask(str(work))
    return [reader, WriteTask(reader)]
