"""Tiny Megatron token files for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def write_corpus(
    prefix: Path,
    *,
    documents: int = 40,
    length: int = 200,
    shortest: int | None = None,
    vocab: int = 512,
    seed: int = 0,
) -> str:
    """Write `prefix.bin/.idx` of random documents, each a noisy arithmetic progression: something to learn.

    All are `length` tokens long, or of `shortest` to `length`.

    Returns:
        The prefix as text.
    """
    from elas.files import write_json

    random = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = [length] * documents if shortest is None else random.integers(shortest, length + 1, documents)
    steps = [random.choice([1, 2, 3], size=size) for size in lengths]
    write_documents(prefix, [(random.integers(vocab) + np.cumsum(s)) % vocab for s in steps], np.uint16)
    write_json(Path(f"{prefix}.manifest.json"), {"vocab_size": vocab})
    return str(prefix)


SMALL = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 128,
    "model.vocab_size": 512,
    "model.seq_length": 32,
    "low_rank.rank": 16,
    "sparsity.dense_steps": 2,
    "optimizer.lr": 3e-3,
    "schedule.warmup_steps": 2,
    "train.dtype": "float32",
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.steps": 10,
    "train.eval_batches": 1,
    "checkpoint.every_steps": 3,
    "log.every_steps": 1,
    "log.trackers": [],
}


def arguments(settings: dict) -> list[str]:
    """Settings by dotted key as command-line arguments."""
    return [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]


def write_documents(prefix: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Write `PREFIX.bin` and `.idx` of documents that are at hand; for small corpora."""
    from elas.data_prep.indexed_writer import write_index

    lengths = []
    with open(f"{prefix}.bin", "wb") as file:
        for ids in documents:
            file.write(ids.astype(dtype).tobytes())
            lengths.append(len(ids))
    write_index(Path(f"{prefix}.idx"), np.dtype(dtype), len(lengths), lambda: [np.array(lengths)])
