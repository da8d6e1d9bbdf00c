"""Tokenises documents in worker processes; what comes out is in the order in which it went in.

The calling process hands out batches of about 1 MB of text through a bounded window, so memory does not grow with the
corpus and the result is the same for any number of workers. Workers are spawned and hold only the tokenizer, not torch.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from elas.data_prep.sources import Document
from elas.data_prep.tokenizer import load_tokenizer

BATCH_CHARS = 1_000_000
BATCH_DOCUMENTS = 1000
BATCHES_PER_WORKER = 8  # queued; also what the workers live on while the writer imports Megatron


class _Batch:
    """Documents handed out together."""

    def __init__(self):
        self.names: list[str] = []
        self.texts: list[str] = []


class Encoded:
    """A batch's tokens: `ids` of all documents end to end, `lengths` (0: none) and UTF-8 `sizes` a document."""

    def __init__(self, ids: np.ndarray, lengths: list[int], sizes: list[int]):
        self.ids, self.lengths, self.sizes = ids, lengths, sizes
        self.pid, self.peak_rss_mb = os.getpid(), peak_rss_mb()


class _Encoder:
    """Turns texts into tokens; one lives in every process that tokenises."""

    current: "_Encoder | None" = None

    def __init__(self, tokenizer_path: str, dtype: str, eod: int | None):
        self.encode = load_tokenizer(tokenizer_path).encode
        self.dtype, self.ending = dtype, [] if eod is None else [eod]

    def __call__(self, texts: list[str]) -> Encoded:
        parts, lengths = [], []
        for text in texts:
            ids = self.encode(text) if text.strip() else []
            ids = ids + self.ending if ids else ids
            parts.append(np.array(ids, dtype=self.dtype))
            lengths.append(len(ids))
        return Encoded(np.concatenate(parts), lengths, [len(text.encode()) for text in texts])


def _start_worker(*job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker a core is parallel enough
    _Encoder.current = _Encoder(*job)


def _run_worker(texts: list[str]) -> Encoded:
    return _Encoder.current(texts)


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    batch, size = _Batch(), 0
    for document in documents:
        batch.names.append(document.name)
        batch.texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch.texts) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = _Batch(), 0
    if batch.texts:
        yield batch


def encode_all(documents: Iterable[Document], job: tuple, workers: int) -> Iterator[tuple[list[str], Encoded]]:
    """The tokens of all documents, a batch at a time, in order.

    Args:
        documents: read as a stream.
        job: tokenizer path, name of the numpy dtype, and the id to end documents with (None for none).
        workers: processes; 1 for none but the caller.

    Yields:
        The names of a batch's documents, and their tokens.
    """
    batches = _batches(documents)
    if workers == 1:
        encode = _Encoder(*job)
        yield from ((batch.names, encode(batch.texts)) for batch in batches)
        return
    # An executor, not a Pool: when a worker is killed for memory it raises, where a Pool would wait for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=job) as pool:
        window: deque[tuple[list[str], Future]] = deque()
        try:
            for batch in batches:
                window.append((batch.names, pool.submit(_run_worker, batch.texts)))
                if len(window) >= workers * BATCHES_PER_WORKER:
                    names, future = window.popleft()
                    yield names, future.result()
            while window:
                names, future = window.popleft()
                yield names, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def peak_rss_mb() -> float:
    """This process's peak resident memory in 10⁶ bytes."""
    try:
        # Not ru_maxrss first: a spawned process starts out with its parent's.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
