"""Text tokenised as `elas prep tokenize` does it, but into memory."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datatrove.data import Document

from elas.data.tokenizer import Tokenizer
from elas.data_prep.encoder import Encoder
from elas.data_prep.loss import Loss
from elas.data_prep.options import Options, make_settings
from elas.data_prep.plan import Plan
from elas.data_prep.sources import Corpus, kind_of
from elas.errors import UserError
from elas.evaluate.rows import Documents

_BATCH_CHARS, _BATCH_DOCUMENTS = 1_000_000, 256


def read_text(inputs: Sequence[str], tokenizer: Tokenizer, limit: int | None) -> tuple[Documents, list[str]]:
    """Tokenise text: an end-of-document id after every document, no id of a special token for text that spells one.

    Args:
        inputs: files, folders or globs as for `elas prep tokenize --input`: text, `.jsonl`, `.parquet` …,
            compressed or not, with a field after a colon where records do not name their text `text`.
        tokenizer: of the model.
        limit: stop after the document in which this many tokens can be predicted; None for all.

    Returns:
        The documents with their sizes in bytes of UTF-8, and lines on what was left out.

    Raises:
        UserError: an input does not exist, cannot be read, or holds no text.
    """
    name = " ".join(inputs)
    try:
        corpus = Corpus(inputs)
        notes = list(corpus.notes)
        held = _encode(corpus, tokenizer, limit)
    except UserError as error:
        why = str(error).replace("--input", "--text", 1)
        if "unknown file type; " in why:  # prep's options are not this command's
            why = why.partition("; ")[0] + "; rename it to .txt, or to what it is (.jsonl, .parquet, …)"
        raise UserError(why) from error
    if not held.lengths:
        raise UserError(f"--text {name}: holds no text; give files with text")
    for reason, count in (corpus.skipped.reasons + held.reasons).items():
        notes.append(f"left out {count:,} documents or lines: {reason}")
    if held.loss.unknown_ids:
        notes.append(f"{held.loss.unknown_ids:,} tokens are unknown to the tokenizer, and easy to predict")
    lengths = np.array(held.lengths, np.int64)
    ids = np.frombuffer(held.ids, np.int32)
    sizes = np.array(held.sizes, np.int64)
    return Documents(f"--text {name}", ids, np.cumsum(lengths) - lengths, lengths, sizes), notes


class _Held:
    """Takes what an `Encoder` writes, in place of `elas.data_prep.shards.PartWriter`, which writes files."""

    def __init__(self):
        self.ids, self.lengths, self.sizes = array("i"), array("q"), array("q")
        self.loss = Loss()
        self.reasons: Counter[str] = Counter()

    def add(self, side: int, ids: np.ndarray, documents: np.ndarray) -> None:
        """Keep the tokens and sizes of some documents."""
        self.ids.frombytes(np.ascontiguousarray(ids, np.int32).tobytes())
        self.lengths.extend(documents["tokens"].tolist())
        self.sizes.extend(documents["bytes"].tolist())

    def skip(self, file: int, begin: int, line: int | None, reason: str) -> None:
        """Count a document that was left out."""
        self.reasons[kind_of(reason)] += 1


def _encode(corpus: Corpus, tokenizer: Tokenizer, limit: int | None) -> _Held:
    settings = make_settings(corpus, tokenizer.path, Options())
    encoder, held = Encoder(Plan(settings, corpus.files, tasks=[], outputs=["memory"], source={})), _Held()
    for batch in _batches(corpus):
        encoder.write(batch, held)
        if limit is not None and len(held.ids) > limit:
            break
    return held


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    batch, size = [], 0
    for number, document in enumerate(corpus):
        batch.append(
            Document(document.text, document.name, metadata={"where": {"file": 0, "begin": 0, "line": number}})
        )
        size += len(document.text)
        if size > _BATCH_CHARS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
