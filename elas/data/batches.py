"""Batches: Megatron-core's `GPTDataset` (packing, shuffling, blending) or single documents, cut by consumed samples.

Sample n of the run is sample n of a fixed order. Step k takes samples [k·G, (k+1)·G) of global batch size G;
micro-batch m of data-parallel rank d takes `micro_batch_size` of them from offset (m·dp + d)·micro. So the position
after k steps is the number k·G, resuming is exact, and every layout sees the same global batches. The order does not
depend on how long the run is to be: each source is shuffled epoch by epoch (Megatron would shuffle all epochs of a run
together), so a run that is given more steps goes on as if it had had them from the start.
"""

import logging
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.data.documents import IGNORED, TruncatedDocuments
from elas.data.token_files import read_token_files
from elas.errors import ConfigError, UserError
from elas.parallel import Layout

Epoch = GPTDataset | TruncatedDocuments


class _Tokens:
    """What `GPTDataset` asks of a tokenizer: no id is padding (samples are packed full), none resets positions."""

    pad = -1
    eod = -2
    vocab_size = None
    unique_identifiers: ClassVar = OrderedDict(kind="elas-packed")


class Epochs(torch.utils.data.Dataset):
    """`samples` samples of a dataset, over and over: the first epoch in its own order, later ones shuffled anew.

    Args:
        dataset: one epoch, in Megatron's shuffled order.
        samples: how many to hand out.
        seed: of the later epochs' orders.
    """

    def __init__(self, dataset: GPTDataset | TruncatedDocuments, samples: int, seed: int):
        self.dataset, self.samples, self.seed = dataset, samples, seed
        # What BlendedDataset asks of its parts; `samples` is left out, so its cache serves runs of every length.
        self.index_split = dataset.index_split
        self.unique_identifiers = OrderedDict(kind="elas-epochs", dataset=dataset.unique_identifiers, seed=seed)
        self._order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict:
        epoch, position = divmod(int(index), len(self.dataset))
        return self.dataset[int(self._order(epoch)[position]) if epoch else position]

    def _order(self, epoch: int) -> np.ndarray:
        """Order of one epoch: int64 `[samples of an epoch]`."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))


@dataclass(frozen=True)
class Datasets:
    """Training and validation samples; `valid` is None when validation is off."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None
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
    parts = [_one_epoch(config, prefix, "1,0,0" if own else config.data.split) for prefix in prefixes]
    train = _blend(config, "data.train", [train for train, _ in parts], weights, train_samples)
    sources = tuple(prefixes) if len(prefixes) > 1 else ()
    if not valid_samples:
        return Datasets(train, None, sources)
    held_out = [valid for _, valid in parts]
    if own:
        prefixes, weights = parse_blend("data.valid", config.data.valid)
        held_out = [_one_epoch(config, prefix, "0,1,0")[1] for prefix in prefixes]
    valid = _blend(config, "data.valid" if own else "data.split", held_out, weights, valid_samples)
    return Datasets(train, valid, sources)


def _settings(config: Config, **source) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.model.seq_length,
        path_to_cache=config.data.cache or str(Path(config.train.run_dir) / "index-cache"),
        tokenizer=_Tokens(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **source,
    )


def _one_epoch(config: Config, prefix: str, split: str) -> tuple[Epoch | None, Epoch | None]:
    """One epoch of a corpus's training and validation documents, None where the split gives a part nothing."""
    if config.data.packing == "document":
        return _truncated_documents(config, prefix, split)
    settings = _settings(config, blend=([prefix], None), split=split)
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * len(Split), lambda: True, settings)
    try:
        train, valid, _test = builder.build()
    except (EOFError, ValueError, pickle.UnpicklingError) as error:  # how NumPy takes a damaged file
        folder = settings.path_to_cache
        raise ConfigError("data.cache", folder, f"holds a damaged sample index ({error})", "remove it") from error
    return train, valid


def _truncated_documents(config: Config, prefix: str, split: str) -> tuple[Epoch | None, Epoch | None]:
    """The same, a document a sample; documents are divided as Megatron divides them."""
    shares = np.array([float(share) for share in (split + ",0,0").split(",")[:3]])
    edges = [
        0,
        *(round(edge) for edge in np.cumsum(shares / shares.sum()) * read_token_files("data", prefix).documents),
    ]
    found = []
    for part, (first, last) in zip((Split.train, Split.valid), pairwise(edges)):
        samples = TruncatedDocuments(prefix, first, last, part, config.model.seq_length, config.train.seed)
        found.append(samples if len(samples) else None)
    return found[0], found[1]


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
    settings = _settings(config, blend=(["blend"], None), split="1,0,0")
    return BlendedMegatronDatasetBuilder.build_generic_dataset(
        BlendedDataset, lambda: True, True, sources, weights, samples, settings
    )


def micro_batches(
    dataset: torch.utils.data.Dataset, config: Config, layout: Layout, *, consumed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This data-parallel rank's micro-batches, from `consumed` samples of the whole run on, until the data ends.

    Yields:
        Tokens and labels, int64 `[micro_batch_size, seq_length]`, on this process's device; label −1 counts for
        nothing.

    Raises:
        UserError: a token id that the model has no embedding for.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for start in range(consumed, len(dataset) - stride + 1, stride):
        first = start + layout.dp_rank * size
        samples = [dataset[index] for index in range(first, first + size)]
        tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
        _check_ids(tokens, labels, config.model.vocab_size, first)
        yield tokens.to(device, torch.int64), labels.to(device, torch.int64)


def _check_ids(tokens: torch.Tensor, labels: torch.Tensor, vocab_size: int, first: int) -> None:
    for ids in (tokens, torch.where(labels == IGNORED, 0, labels)):
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"data.train: token id {low if low < 0 else high} near sample {first} is outside "
                f"model.vocab_size={vocab_size}; set model.vocab_size to the tokenizer's, or tokenise again",
                on_every_rank=False,
            )
