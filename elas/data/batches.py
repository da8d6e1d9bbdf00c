"""Batches from Megatron-core's `GPTDataset` (packing, shuffling, blending) or from single truncated documents.

The samples of a run have a fixed order. Step k takes samples [k·G, (k+1)·G) for global batch size G; micro-batch m of
data-parallel rank d takes `micro_batch_size` of them from offset (m·dp + d)·micro. The position after k steps is
therefore just k·G: resume is exact, and every layout sees the same global batches. The order does not depend on
`train.steps`: each source is shuffled epoch by epoch (Megatron shuffles all epochs of a run together), so a run
extended by more steps continues as if it had been started with them.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.data.documents import IGNORED, TruncatedDocuments
from elas.data.packed import Epochs, PackedDocuments, build_indexed, packed_epoch, packed_settings
from elas.data.split import EVERYTHING, divide, parse_split
from elas.data.token_files import read_token_files
from elas.errors import ConfigError, UserError
from elas.parallel import Layout

Epoch = PackedDocuments | TruncatedDocuments
Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and labels, int64 [micro_batch_size, seq_length]


class Samples(Protocol):
    """A dataset of samples: `tokens` and `labels`, int64 `[seq_length]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


@dataclass(frozen=True)
class Datasets:
    """Training and validation samples; `valid` is None when validation is off."""

    train: Samples
    valid: Samples | None
    """The samples of one validation, each once."""
    valid_available: int = 0
    """Samples available for validation; more than `len(valid)` if `train.eval_batches` covers only a part."""
    sources: tuple[str, ...] = ()
    """Prefixes of the corpora blended into `train`; empty for a single corpus."""

    def samples_by_source(self, consumed: int) -> dict[str, int]:
        """How many of the first `consumed` training samples come from each source; empty without a blend."""
        if not self.sources:
            return {}
        assert isinstance(self.train, BlendedDataset)  # of several sources
        drawn = np.bincount(self.train.dataset_index[:consumed], minlength=len(self.sources))
        return dict(zip(self.sources, drawn.tolist()))


def build_datasets(config: Config, beyond: int = 0) -> Datasets:
    """Build the datasets on every rank (rank 0 builds the index files; the others wait, then map them).

    Args:
        config: validated; `data.*`, batch sizes and seed determine the order of samples, `train.steps` their number.
        beyond: further training samples beyond that number.

    Raises:
        ConfigError: a part of the corpus is too small for one sample.
    """
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    train_samples = config.train.steps * config.train.global_batch_size + beyond
    valid_samples = config.train.eval_batches * config.train.global_batch_size
    prefixes, weights = parse_blend("data.train", config.data.train)
    own = config.data.valid is not None
    shares = EVERYTHING if own else parse_split(config.data.split)
    train_parts = [_one_epoch(config, prefix, Split.train, shares) for prefix in prefixes]
    train = _blend(config, "data.train", train_parts, weights, train_samples)
    sources = tuple(prefixes) if len(prefixes) > 1 else ()
    if not valid_samples:
        return Datasets(train, None, sources=sources)
    if own:
        prefixes, weights = parse_blend("data.valid", config.data.valid)
        shares = (0.0, 1.0, 0.0)
    parts = [_one_epoch(config, prefix, Split.valid, shares) for prefix in prefixes]
    return Datasets(
        train, *_each_once(config, "data.valid" if own else "data.split", parts, weights, valid_samples), sources
    )


def _cache(config: Config) -> str:
    return config.data.cache or str(Path(config.train.run_dir) / "index-cache")


def _one_epoch(config: Config, prefix: str, part: Split, shares: tuple[float, float, float]) -> Epoch | None:
    """One epoch of a corpus's training or validation documents; None if they do not fill one sample."""
    files = read_token_files("data", prefix)
    documents = divide(files.documents, shares)[part.value]
    # Validation ignores the seed: runs with different seeds are compared on the same samples.
    seed, seq_length = config.train.seed if part is Split.train else 0, config.model.seq_length
    if config.data.packing == "document":
        return TruncatedDocuments(files, documents, part, seq_length, seed)
    if files.lengths_of(documents).sum() <= seq_length:  # Megatron loops forever on a part without a sample
        return None
    return packed_epoch(files, documents, part, seed=seed, seq_length=seq_length, cache=_cache(config))


def _blend(
    config: Config, key: str, parts: list[Epoch | None], weights: list[float] | None, samples: int
) -> Epochs | BlendedDataset:
    """`samples` samples of the parts, drawn by weight (by size if None)."""
    epochs = [part for part in parts if part is not None and len(part)]
    if len(epochs) < len(parts):
        why = f"one of its parts has too few tokens for one sample of model.seq_length={config.model.seq_length}"
        raise ConfigError(
            key, getattr(config.data, key.split(".")[1]), why, "use a larger corpus or another data.split"
        )
    if len(epochs) == 1:
        return Epochs(epochs[0], samples, config.train.seed)
    sources = [Epochs(epoch, samples, config.train.seed) for epoch in epochs]
    weights = weights or [float(len(epoch)) for epoch in epochs]
    settings = packed_settings(config.train.seed, config.model.seq_length, _cache(config))
    return build_indexed(BlendedDataset, sources, weights, samples, settings)


def _each_once(
    config: Config, key: str, parts: list[Epoch | None], weights: list[float] | None, samples: int
) -> tuple[Samples, int]:
    """At most `samples` of the parts' samples, each at most once, and how many are available.

    A blend ends when its first source is exhausted, so that its weights hold.
    """
    sizes = np.array([0 if part is None else len(part) for part in parts], dtype=float)
    shares = np.array(weights or sizes)
    available = int(min(sizes / shares) * shares.sum() + 1e-6) if sizes.all() else 0
    blend = _blend(config, key, parts, weights, min(samples, available))
    if isinstance(blend, Epochs):
        return blend, available
    # Megatron follows the weights only to within a sample, so a source may be exhausted slightly earlier.
    exhausted = blend.dataset_sample_index >= sizes[blend.dataset_index]
    if not exhausted.any():
        return blend, available
    end = int(np.argmax(exhausted))
    first: Any = torch.utils.data.Subset(blend, range(end))  # Subset's annotations lack what it subsets
    return first, end


def micro_batches(dataset: Samples, config: Config, layout: Layout, *, consumed: int = 0) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches, starting after `consumed` samples of the whole run.

    Yields:
        Tokens and labels, int64 `[micro_batch_size, seq_length]`, on this process's device; label −1 is ignored in
        the loss.

    Raises:
        UserError: a token id is outside the model's vocabulary.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    for start in range(consumed, len(dataset) - stride + 1, stride):
        first = start + layout.dp_rank * size
        yield _batch(dataset, range(first, first + size), config, "data.train")


def whole_set(dataset: Samples, config: Config, layout: Layout) -> Iterator[list[Batch]]:
    """This data-parallel rank's share of every sample once, as the micro-batches of each global batch.

    All ranks get the same number of global batches and micro-batches. Missing samples in the last ones are replaced by
    blank ones, whose labels are all −1.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    key = "data.train" if config.data.valid is None else "data.valid"
    multiple = stride * (layout.pp if layout.vpp > 1 else 1)  # interleaving takes micro-batches in multiples of pp
    for start in range(0, len(dataset), config.train.global_batch_size):
        left = min(config.train.global_batch_size, len(dataset) - start)
        firsts = range(start + layout.dp_rank * size, start + -(-left // multiple) * multiple, stride)
        yield [_batch(dataset, range(first, first + size), config, key) for first in firsts]


def _batch(dataset: Samples, places: range, config: Config, key: str) -> Batch:
    """One micro-batch on this process's device; rows past the end of the dataset are blank."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    samples = [dataset[index] for index in places if index < len(dataset)]
    shape = (len(places), config.model.seq_length)
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, sample in enumerate(samples):
        tokens[row], labels[row] = sample["tokens"], sample["labels"]
    _check_ids(key, tokens, labels, config.model.vocab_size, places.start)
    return tokens.to(device), labels.to(device)


def _check_ids(key: str, tokens: torch.Tensor, labels: torch.Tensor, vocab_size: int, first: int) -> None:
    for ids in (tokens, torch.where(labels == IGNORED, 0, labels)):
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{key}: token id {low if low < 0 else high} near sample {first} is outside "
                f"model.vocab_size={vocab_size}; set model.vocab_size to the tokenizer's, or tokenise again",
                on_every_rank=False,
            )
