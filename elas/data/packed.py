"""Packed documents: Megatron-core's `GPTDataset` over selected documents, and epochs of any dataset."""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from elas.data.documents import TruncatedDocuments
from elas.data.token_files import TokenFiles
from elas.errors import ConfigError


class _Tokens:
    """The tokenizer attributes that `GPTDataset` reads; no id is padding (samples are full) or resets positions."""

    pad = -1
    eod = -2
    vocab_size = None
    unique_identifiers: ClassVar = OrderedDict(kind="elas-packed")


@dataclass
class PackedConfig(GPTDatasetConfig):
    """Megatron's settings, plus a content key: Megatron's cache key identifies a corpus by its path alone."""

    content: str = ""
    """`TokenFiles.content` of the documents."""


class PackedDocuments(GPTDataset):
    """`GPTDataset` whose cached sample index is keyed by the corpus's content, not its path."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "content"]


def packed_settings(seed: int, seq_length: int, cache: str, content: str = "") -> PackedConfig:
    """Settings of one packed dataset, or of a blend (which has no `content` of its own)."""
    return PackedConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=cache,
        tokenizer=_Tokens(),  # pyright: ignore[reportArgumentType]  GPTDataset reads these attributes alone
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=(["-"], None),  # a placeholder: without a blend Megatron generates mock data; documents are given apart
        split="1,0,0",
        content=content,
    )


def packed_epoch(
    files: TokenFiles, documents: np.ndarray, part: Split, *, seed: int, seq_length: int, cache: str
) -> PackedDocuments:
    """One epoch of documents, packed; rank 0 builds the sample index, the others wait, then map it.

    Args:
        files: the corpus.
        documents: numbers of the documents to use, int64, ascending.
        part: training or validation.
        seed: of the order.
        seq_length: tokens in a sample.
        cache: folder for the sample index.

    Raises:
        ConfigError: the cached sample index is damaged.
    """
    settings = packed_settings(seed, seq_length, cache, files.content(documents))
    low_level = PackedDocuments.build_low_level_dataset(files.prefix, settings)
    sequences = files.sequences_of(documents)
    return build_indexed(PackedDocuments, low_level, files.prefix, sequences, None, part, settings)


def build_indexed(kind: type, *arguments: Any) -> Any:
    """Build a Megatron dataset, rank 0 first; the last argument must be its `PackedConfig`.

    Raises:
        ConfigError: the cached index is damaged.
    """
    cache = arguments[-1].path_to_cache
    try:
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, lambda: True, True, *arguments)
    except (EOFError, ValueError, pickle.UnpicklingError) as error:  # NumPy raises these for a damaged file
        raise ConfigError("data.cache", cache, f"holds a damaged sample index ({error})", "remove it") from error


class Epochs(torch.utils.data.Dataset):
    """`samples` samples of a repeated dataset: the first epoch in the dataset's own order, later ones reshuffled.

    Args:
        dataset: one epoch, already shuffled.
        samples: length of this dataset.
        seed: of the later epochs' orders.
    """

    def __init__(self, dataset: GPTDataset | TruncatedDocuments, samples: int, seed: int):
        self.dataset, self.samples, self.seed = dataset, samples, seed
        # Attributes that BlendedDataset requires of its parts. Without `samples`, its cache serves runs of any length.
        self.index_split = dataset.index_split
        self.unique_identifiers = OrderedDict(kind="elas-epochs", dataset=dataset.unique_identifiers, seed=seed)
        self._order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict:
        epoch, position = divmod(int(index), len(self.dataset))
        return self.dataset[int(self._order(epoch)[position]) if epoch else position]

    def _order(self, epoch: int) -> np.ndarray:
        """Order of one epoch: int64 `[len(dataset)]`."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
