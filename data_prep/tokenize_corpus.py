"""Text to Megatron token files: one document and its end-of-document id at a time, in the order of the input.

`encoding_pool` tokenises, `indexed_writer` writes; here documents are split into trained-on and held out, and counted.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from elas.data_prep.encoding_pool import Encoded, encode_all, peak_rss_mb
from elas.data_prep.folders import folders_for
from elas.data_prep.indexed_writer import IndexedWriter
from elas.data_prep.sources import Corpus, Document, check_fraction, held_out
from elas.data_prep.tokenizer import load_tokenizer
from elas.errors import ConfigError, UserError

UINT16_VOCAB = 65500  # Megatron's own bound for two-byte tokens


def tokenize_corpus(
    documents: Iterable[Document],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    *,
    valid_prefix: str | Path | None = None,
    valid_fraction: float = 0.0,
    workers: int | None = None,
    append_eod: bool = True,
) -> dict:
    """Write `output_prefix.{bin,idx,manifest.json}`, and the same at `valid_prefix` for the held-out documents.

    Args:
        documents: read once, as a stream; a `Corpus` adds its inputs and skips to the facts.
        tokenizer_path: what `load_tokenizer` reads.
        output_prefix: path without ending; its folder is made when missing, files are replaced whole.
        valid_prefix: where held-out documents go; needs `valid_fraction` above 0, and the other way round.
        valid_fraction: fraction of documents to hold out, by hash of their names.
        workers: processes that tokenise; None for one a usable core, 1 for none but the caller.
        append_eod: end every document with the tokenizer's `eod`.

    Returns:
        `documents`, `tokens` and `bytes_in` (UTF-8) of `output_prefix`, the same with `valid_` before them, `skipped`
        and `skip_reasons`, `seconds`, `mb_per_s` (10⁶ bytes of text, all of it, import of Megatron included),
        `peak_rss_mb` (10⁶ bytes, sum of the peaks of all processes), `dtype`, `vocab_size`, `tokenizer_sha256`.

    Raises:
        UserError: no document at all on one of the two sides, bad arguments, or a tokenizer that cannot be read.
            Nothing is written then.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    prefixes = _check(output_prefix, valid_prefix, valid_fraction, workers)
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < UINT16_VOCAB else np.int32)
    eod = tokenizer.eod if append_eod else None
    facts = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "eod": eod,
        "workers": workers,
    }
    with folders_for({key: prefix.parent for key, prefix in zip(("--output", "--valid-output"), prefixes)}):
        return _tokenize(documents, prefixes, facts, tokenizer_path, valid_fraction)


def _tokenize(
    documents: Iterable[Document],
    prefixes: list[Path],
    facts: dict,
    tokenizer_path: str | Path,
    valid_fraction: float,
) -> dict:
    """Write the files; returns `facts` with the counts."""
    encoding = str(tokenizer_path), facts["dtype"], facts["eod"]
    writers = [IndexedWriter(prefix, np.dtype(facts["dtype"]).type) for prefix in prefixes]
    try:
        with closing(encode_all(documents, encoding, facts["workers"])) as encoded:
            facts |= _write(encoded, writers, valid_fraction)
        _add_reader_skips(facts, documents)
        _check_not_empty(writers, facts["skip_reasons"], valid_fraction)
        source = documents.describe() if isinstance(documents, Corpus) else {}
        source |= {"tokenizer": str(tokenizer_path), "valid_fraction": valid_fraction}
        manifests = [{"format": "elas-tokens-1", **w.finalize(), **facts, "source": source} for w in writers]
        for writer, manifest in zip(writers, manifests, strict=True):
            writer.commit(manifest)
    finally:
        for writer in writers:
            writer.discard()
    for writer, prefix in zip(writers, ("", "valid_")):
        counts = {"documents": writer.documents, "tokens": writer.tokens, "bytes_in": writer.bytes_in}
        facts = {prefix + key: value for key, value in counts.items()} | facts
    return facts


def _write(encoded: Iterator[tuple[list[str], Encoded]], writers: list[IndexedWriter], valid_fraction: float) -> dict:
    """Hand every document to its writer; returns the counts of the empty ones, the time and the memory it took."""
    progress = _Progress()
    peaks: dict[int, float] = {}
    empty = 0
    for names, batch in encoded:
        peaks[batch.pid] = batch.peak_rss_mb
        end = 0
        for name, length, size in zip(names, batch.lengths, batch.sizes, strict=True):
            begin, end = end, end + length
            if length == 0:
                empty += 1
                continue
            side = len(writers) > 1 and held_out(name, valid_fraction)
            writers[side].add(batch.ids[begin:end], size)
        progress.show(writers)
    progress.clear()
    peaks[os.getpid()] = peak_rss_mb()
    seconds = time.perf_counter() - progress.start
    return {
        "skip_reasons": {"empty": empty} if empty else {},
        "seconds": round(seconds, 3),
        "mb_per_s": round(sum(writer.bytes_in for writer in writers) / 1e6 / seconds, 3),
        "peak_rss_mb": round(sum(peaks.values()), 1),
    }


def _add_reader_skips(facts: dict, documents: Iterable[Document]) -> None:
    if isinstance(documents, Corpus):
        facts["skip_reasons"] = dict(documents.skipped.reasons) | facts["skip_reasons"]
    facts["skipped"] = sum(facts["skip_reasons"].values())


def _check(output_prefix, valid_prefix, valid_fraction: float, workers: int) -> list[Path]:
    """The prefixes to write."""
    check_fraction("--valid-fraction", valid_fraction)
    if workers < 1:
        raise ConfigError("--workers", workers, "nobody would tokenise", "give 1 or more")
    if valid_prefix is None and valid_fraction > 0:
        raise ConfigError("--valid-fraction", valid_fraction, "nowhere to put them", "add --valid-output PREFIX")
    if valid_prefix is not None and valid_fraction == 0:
        raise ConfigError("--valid-output", str(valid_prefix), "nothing would go there", "add --valid-fraction 0.02")
    prefixes = [Path(p) for p in (output_prefix, valid_prefix) if p is not None]
    if len({p.resolve() for p in prefixes}) < len(prefixes):
        raise ConfigError("--valid-output", str(valid_prefix), "is --output as well", "give another prefix")
    for key, prefix in zip(("--output", "--valid-output"), prefixes):
        if not prefix.name or str(prefix).endswith(("/", ".bin", ".idx")) or prefix.is_dir():
            raise ConfigError(key, str(prefix), "is not a file prefix", "give a path such as data/train")
    return prefixes


def _check_not_empty(writers: list[IndexedWriter], skips: dict[str, int], valid_fraction: float) -> None:
    reasons = ", ".join(f"{n} {reason}" for reason, n in skips.items()) or "none"
    if not any(writer.documents for writer in writers):
        raise UserError(f"--input: no document with text in it (skipped: {reasons}); check the inputs and --field")
    for writer in writers:
        if writer.documents == 0:
            why = f"no document fell to {writer.prefix}"
            raise ConfigError("--valid-fraction", valid_fraction, why, "give another fraction or more documents")


class _Progress:
    """One line on stderr, rewritten twice a second; nothing when that is not a terminal."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.active, self.shown = sys.stderr.isatty(), False

    def show(self, writers: list[IndexedWriter]) -> None:
        now = time.perf_counter()
        if self.active and now - self.last >= 0.5:
            self.last, self.shown = now, True
            documents, tokens, size = (sum(getattr(w, k) for w in writers) for k in ("documents", "tokens", "bytes_in"))
            rate = size / 1e6 / (now - self.start)
            line = f"\r{documents:,} documents  {tokens:,} tokens  {size / 1e6:,.0f} MB  {rate:.1f} MB/s"
            print(f"{line:<78}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
            self.shown = False
