"""Train a SentencePiece tokenizer that decodes source code exactly.

No normalisation; runs of spaces may be pieces; newline and tab are pieces of their own; other characters fall back to
bytes. BPE is the default because it is faster: 8192 pieces from 8 MB of Python source took 1.5 s on two cores at 3.29
bytes per token, unigram 17.8 s at 3.03. Training on all 31 MB gives 3.31 (5.6 s), so a sample is enough.
"""

import heapq
import io
import os
import re
import time
from collections.abc import Iterable, Iterator
from hashlib import blake2b, sha256
from pathlib import Path

from elas.data.tokenizer import MODEL_NAME, SentencePieceTokenizer
from elas.data_prep.folders import folders_for
from elas.data_prep.sources import Corpus, Document, check_fraction, held_out
from elas.errors import ConfigError, UserError
from elas.files import write_json

CHUNK_CHARS = 2000
SMALLEST_VOCAB = 300
DEFAULT_SAMPLE_BYTES = 16_000_000
READ_AT_MOST = 8
"""Of a large corpus, at most this many times the sample's bytes are read, from pieces all over it."""


def train_tokenizer(
    documents: Iterable[Document],
    output: Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    valid_fraction: float = 0.0,
    valid_max_bytes: int | None = None,
) -> dict:
    """Train on a deterministic sample and write `tokenizer.model`, `tokenizer.vocab` and `manifest.json` (last).

    Args:
        documents: read once, as a stream; a `Corpus` adds its inputs and skips to the manifest.
        output: folder, created if missing; existing files are replaced atomically.
        vocab_size: number of ids, including 4 special ones, 256 bytes, newline and tab.
        model_type: `bpe` or `unigram`.
        sample_bytes: train on about this many bytes, spread evenly over the documents that are read; of a corpus
            larger than `READ_AT_MOST` times as many bytes, only a part is read.
        valid_fraction, valid_max_bytes: exclude the documents that `tokenize_corpus` holds out with the same values.

    Returns:
        The manifest.

    Raises:
        UserError: no text, too little text for `vocab_size`, or `output` cannot be created.
    """
    output = Path(output)
    if model_type not in ("bpe", "unigram"):
        raise ConfigError("--model-type", model_type, "unknown", "choose bpe or unigram")
    if vocab_size < SMALLEST_VOCAB:
        why = "too small, since bytes and special ids alone take 262"
        raise ConfigError("--vocab-size", vocab_size, why, f"give {SMALLEST_VOCAB} or more")
    if sample_bytes < 10_000:
        raise ConfigError("--sample-bytes", sample_bytes, "too small to train on", "give 10000 or more")
    check_fraction("--valid-fraction", valid_fraction)
    with folders_for({"--output": output}):
        return _train_and_write(
            documents, output, vocab_size, model_type, sample_bytes, (valid_fraction, valid_max_bytes)
        )


def _train_and_write(
    documents: Iterable[Document],
    output: Path,
    vocab_size: int,
    model_type: str,
    sample_bytes: int,
    valid: tuple[float, int | None],
) -> dict:
    start = time.perf_counter()
    counts = {"documents": 0, "bytes_in": 0, "empty": 0}
    read = documents
    if isinstance(documents, Corpus) and documents.is_larger_than(READ_AT_MOST * sample_bytes):
        read = documents.some(READ_AT_MOST * sample_bytes)
    training = _counted((d for d in read if not held_out(d.text, *valid)), counts)
    sample = sample_chunks(training, sample_bytes)
    sampled = time.perf_counter()
    model = _train(sample, vocab_size, model_type)
    trained = time.perf_counter()

    empty = counts.pop("empty")
    skips = dict(documents.skipped.reasons) if isinstance(documents, Corpus) else {}
    skips |= {"empty": empty} if empty else {}
    manifest = {
        "format": "elas-tokenizer-1",
        "model_type": model_type,
        "vocab_size": vocab_size,
        "sha256": sha256(model).hexdigest(),
        **counts,
        "sample_bytes": sum(len(chunk.encode()) for chunk in sample),
        "valid_fraction": valid[0],
        "valid_max_bytes": valid[1],
        "read_seconds": round(sampled - start, 3),
        "train_seconds": round(trained - sampled, 3),
        "skipped": sum(skips.values()),
        "skip_reasons": skips,
    }
    if isinstance(documents, Corpus):
        manifest |= {"source": documents.describe()}
    _write(output, model, manifest)
    return manifest


def sample_chunks(documents: Iterable[Document], sample_bytes: int) -> list[str]:
    """Sample chunks of whole lines, about 2000 characters each: those with the smallest hashes, up to `sample_bytes`.

    The choice depends on the chunks' text alone, not on files or the order of documents; memory is about
    `sample_bytes` for any size of corpus.
    """
    heap: list[tuple[int, str, int]] = []  # (-hash, chunk, bytes): the largest hash is at the top
    limit, held = 2**64, 0
    for document in documents:
        for chunk in _chunks(document.text):
            data = chunk.encode()
            key, size = int.from_bytes(blake2b(data, digest_size=8).digest()), len(data)
            if key >= limit:
                continue
            heapq.heappush(heap, (-key, chunk, size))
            held += size
            while held > sample_bytes:
                dropped, _, size = heapq.heappop(heap)
                limit, held = -dropped, held - size
    return [chunk for _, chunk, _ in sorted(heap, reverse=True)]


def _train(sample: list[str], vocab_size: int, model_type: str) -> bytes:
    """The serialised model."""
    from sentencepiece import SentencePieceTrainer

    nothing = UserError("--input: no text to train a tokenizer on; check the inputs, --field and what was skipped")
    if not sample:
        raise nothing
    model = io.BytesIO()
    try:
        # num_threads must stay at its default: it is stored in the model, so setting it to the number of cores would
        # give the same pieces a different checksum on every machine.
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=8 * CHUNK_CHARS,  # bytes; a character has at most 4
            minloglevel=2,
        )
    except RuntimeError as error:
        # Without NULs, spaces and SentencePiece's own symbols, the text has no sentence or no characters left.
        if any(sign in str(error) for sign in ("!sentences_.empty()", "all_chars_count", "desired_vocab_size_ >")):
            raise nothing from error
        bound = re.search(r"value <= (\d+)", str(error))
        if bound and int(bound[1]) < SMALLEST_VOCAB:
            why = f"the text has only {bound[1]} different pieces, and a tokenizer requires {SMALLEST_VOCAB}"
            raise ConfigError("--vocab-size", vocab_size, why, "give more text") from error
        if bound:
            fix = f"give at most {bound[1]}, or more text"
            raise ConfigError("--vocab-size", vocab_size, "more pieces than the text has", fix) from error
        if "required_chars" in str(error) or "smaller than" in str(error):
            raise ConfigError(
                "--vocab-size", vocab_size, "fewer pieces than the text has characters", "give a larger one"
            ) from error
        raise
    return model.getvalue()


def _write(output: Path, model: bytes, manifest: dict) -> None:
    partial = output / f".{MODEL_NAME}.{os.getpid()}"
    partial.write_bytes(model)
    tokenizer = SentencePieceTokenizer(partial)
    ids = {name: getattr(tokenizer, name) for name in ("bos", "eos", "eod", "pad")}
    vocab = output / f".tokenizer.vocab.{os.getpid()}"
    vocab.write_text("".join(f"{piece!r}\t{i}\n" for i, piece in tokenizer.inv_vocab.items()), encoding="utf-8")
    (output / "manifest.json").unlink(missing_ok=True)  # a manifest must always match the files beside it
    vocab.replace(output / "tokenizer.vocab")
    partial.replace(output / MODEL_NAME)
    write_json(output / "manifest.json", manifest | {"ids": ids})
    manifest["ids"] = ids


def _counted(documents: Iterable[Document], counts: dict) -> Iterator[Document]:
    for document in documents:
        if not document.text:
            counts["empty"] += 1
            continue
        counts["documents"] += 1
        counts["bytes_in"] += len(document.text.encode())
        yield document


def _chunks(text: str) -> Iterator[str]:
    """Cut a text at line ends, and within lines longer than a chunk."""
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
