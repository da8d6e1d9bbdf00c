"""Batches: Megatron-core's `GPTDataset` (packing, shuffling, blending) or single documents, cut by consumed samples.

Sample n of the run is sample n of a fixed order. Step k takes samples [k·G, (k+1)·G) of global batch size G;
micro-batch m of data-parallel rank d takes `micro_batch_size` of them from offset (m·dp + d)·micro. So the position
after k steps is the number k·G, resuming is exact, and every layout sees the same global batches. The order does not
depend on how long the run is to be: each source is shuffled epoch by epoch (Megatron would shuffle all epochs of a run
together), so a run that is given more steps goes on as if it had had them from the start.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Datasets:
    """Training and validation samples; `valid` is None when validation is off."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None
    """What one validation passes, each sample once."""
    valid_available: int = 0
    """Samples that there are for validation; more than `len(valid)` where `train.eval_batches` takes a part."""
    sources: tuple[str, ...] = ()
    """Prefixes of what `train` is blended from; empty where that is one corpus."""

    def samples_by_source(self, consumed: int) -> dict[str, int]:
        """How many of the first `consumed` training samples came from each source; empty without a blend."""
        if not self.sources:
            return {}
        drawn = np.bincount(self.train.dataset_index[:consumed], minlength=len(self.sources))
        return dict(zip(self.sources, drawn.tolist()))


def build_datasets(config: Config, beyond: int = 0) -> Datasets:
    """Build the datasets on every rank (rank 0 builds the index files, the others wait and map them).

    Args:
        config: validated; `data.*`, batch sizes and seed decide the order of samples, `train.steps` their number.
        beyond: training samples beyond that number.

    Raises:
        ConfigError: a part of the corpus does not make one sample.
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
        train, *_once(config, "data.valid" if own else "data.split", parts, weights, valid_samples), sources
    )


def _cache(config: Config) -> str:
    return config.data.cache or str(Path(config.train.run_dir) / "index-cache")


def _one_epoch(config: Config, prefix: str, part: Split, shares: tuple[float, float, float]) -> Epoch | None:
    """One epoch of the documents of a corpus that are for training or validation; None where there are none."""
    files = read_token_files("data", prefix)
    documents = divide(files.documents, shares)[part.value]
    # Validation is the same for every seed: runs that differ in it are compared on the same samples.
    seed, seq_length = config.train.seed if part is Split.train else 0, config.model.seq_length
    if config.data.packing == "document":
        return TruncatedDocuments(files, documents, part, seq_length, seed)
    if files.lengths_of(documents).sum() <= seq_length:  # Megatron looks for samples in an empty part forever
        return None
    return packed_epoch(files, documents, part, seed=seed, seq_length=seq_length, cache=_cache(config))


def _blend(
    config: Config, key: str, parts: list[Epoch | None], weights: list[float] | None, samples: int
) -> torch.utils.data.Dataset:
    """`samples` samples of the parts, by weight (by size when None)."""
    if not all(part is not None and len(part) for part in parts):
        why = f"a part of it has too few tokens for one sample of model.seq_length={config.model.seq_length}"
        raise ConfigError(
            key, getattr(config.data, key.split(".")[1]), why, "use a larger corpus or another data.split"
        )
    if len(parts) == 1:
        return Epochs(parts[0], samples, config.train.seed)
    sources = [Epochs(part, samples, config.train.seed) for part in parts]
    weights = weights or [float(len(part)) for part in parts]
    settings = packed_settings(config.train.seed, config.model.seq_length, _cache(config))
    return build_indexed(BlendedDataset, sources, weights, samples, settings)


def _once(
    config: Config, key: str, parts: list[Epoch | None], weights: list[float] | None, samples: int
) -> tuple[torch.utils.data.Dataset, int]:
    """At most `samples` of the parts, none of them twice, and how many there could be.

    A blend ends where the first of its sources does, so that its weights hold.
    """
    sizes = np.array([0 if part is None else len(part) for part in parts], dtype=float)
    shares = np.array(weights or sizes)
    available = int(min(sizes / shares) * shares.sum() + 1e-6) if sizes.all() else 0
    blend = _blend(config, key, parts, weights, min(samples, available))
    if len(parts) == 1:
        return blend, available
    spent = blend.dataset_sample_index >= sizes[blend.dataset_index]  # Megatron keeps weights to within a sample
    if not spent.any():
        return blend, available
    end = int(np.argmax(spent))
    return torch.utils.data.Subset(blend, range(end)), end


def micro_batches(
    dataset: torch.utils.data.Dataset, config: Config, layout: Layout, *, consumed: int = 0
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches, from `consumed` samples of the whole run on, until the data ends.

    Yields:
        Tokens and labels, int64 `[micro_batch_size, seq_length]`, on this process's device; label −1 counts for
        nothing.

    Raises:
        UserError: a token id that the model has no embedding for.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    for start in range(consumed, len(dataset) - stride + 1, stride):
        first = start + layout.dp_rank * size
        yield _batch(dataset, range(first, first + size), config, "data.train")


def whole_set(dataset: torch.utils.data.Dataset, config: Config, layout: Layout) -> Iterator[list[Batch]]:
    """Every sample once, in rounds of at most a global batch: this data-parallel rank's micro-batches of each round.

    Every rank gets as many rounds and micro-batches as every other. The last may hold fewer samples than places:
    those are filled with blanks, whose labels all are −1.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    key = "data.train" if config.data.valid is None else "data.valid"
    together = stride * (layout.pp if layout.vpp > 1 else 1)  # an interleaved schedule takes multiples of its stages
    for start in range(0, len(dataset), config.train.global_batch_size):
        left = min(config.train.global_batch_size, len(dataset) - start)
        firsts = range(start + layout.dp_rank * size, start + -(-left // together) * together, stride)
        yield [_batch(dataset, range(first, first + size), config, key) for first in firsts]


def _batch(dataset: torch.utils.data.Dataset, places: range, config: Config, key: str) -> Batch:
    """One micro-batch on this process's device; places past the end of the dataset are blank."""
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
