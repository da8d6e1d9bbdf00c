"""The steps of a task in datatrove's pipeline: read → filter → tokenise and write.

Each step loads the plan from the work folder, so a step pickled for another process or machine stays small.
"""

from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from elas.data_prep.encoder import Encoder
from elas.data_prep.plan import Plan, load_plan
from elas.data_prep.quality import make_filters, rejection
from elas.data_prep.readers import read_piece
from elas.data_prep.shards import PartWriter
from elas.data_prep.sources import place

BATCH_CHARS, BATCH_DOCUMENTS = 1_000_000, 1000


class ReadTask(PipelineStep):
    """Reads the pieces of one task.

    Args:
        work: the work folder with the plan.
    """

    type, name = "reader", "pieces of the plan"

    def __init__(self, work: str):
        super().__init__()
        self.work = work
        self.part: PartWriter | None = None

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of task `rank`; `metadata["where"]`: `file` (index), `begin` of its piece, `line`."""
        plan = load_plan(self.work)
        for index, begin, end in plan.tasks[rank]:
            file = plan.files[index]

            def skip(reason: str, number: int | None, where: tuple[int, int] = (index, begin)) -> None:
                if self.part is not None:
                    self.part.skip(*where, number, reason)

            file.check_unchanged()
            for number, text in read_piece(file.path, file.kind, file.field, (begin, end), skip):
                line = None if file.kind == "text" else number
                if self.part is not None:
                    self.part.read[index] += 1
                where = {"file": index, "begin": begin, "line": line}
                yield Document(text, place(file, number), metadata={"where": where})
            file.check_unchanged()


class WriteTask(PipelineStep):
    """Filters, tokenises and writes the documents of one task.

    Args:
        reader: the preceding step, which records its skipped inputs in the same part.
    """

    type, name = "tokenizer", "Megatron part"

    def __init__(self, reader: ReadTask):
        super().__init__()
        self.reader = reader

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the part of task `rank`."""
        plan = load_plan(self.reader.work)
        part = PartWriter(plan.work, rank, len(plan.outputs), plan.settings.dtype, plan.settings.tokenizer_sha256)
        self.reader.part = part
        try:
            encode = Encoder.of(plan)
            for batch in _batches(self._kept(plan, data, part)):
                encode.write(batch, part)
                self.stat_update("documents", value=len(batch), unit="batch")
            part.commit()
        finally:
            part.discard()

    def _kept(self, plan: Plan, data: Iterator[Document], part: PartWriter) -> Iterator[Document]:
        """Yield the documents to keep; counts the others by reason."""
        settings = plan.settings
        filters = make_filters(settings.filters)
        for document in data:
            size = len(document.text)
            if not size or document.text.isspace():
                part.skip(**document.metadata["where"], reason="empty")
            elif settings.min_chars is not None and size < settings.min_chars:
                part.reasons["too few characters"] += 1
            elif settings.max_chars is not None and size > settings.max_chars:
                part.reasons["too many characters"] += 1
            elif (reason := rejection(filters, document)) is not None:
                part.reasons[reason] += 1
            else:
                yield document


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
    """Load the tokenizer before forking, so that the workers share it."""
    Encoder.of(plan)


def pipeline(work: Path) -> list[PipelineStep]:
    """The steps of a task, in order."""
    reader = ReadTask(str(work))
    return [reader, WriteTask(reader)]
