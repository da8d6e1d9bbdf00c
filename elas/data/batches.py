"""Batches: Megatron-core's `GPTDataset` (packing, blending, shuffling), cut by consumed samples.

Sample n of the run is sample n of the dataset's fixed shuffle. Step k takes samples [k·G, (k+1)·G) of global batch
size G; micro-batch m of data-parallel rank d takes `micro_batch_size` of them from offset (m·dp + d)·micro. So the
position after k steps is the number k·G, resuming is exact, and every layout sees the same global batches.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.parallel import Layout


class _Tokens:
    """What `GPTDataset` asks of a tokenizer: no id is padding (samples are packed full), none resets positions."""

    pad = -1
    eod = -2
    vocab_size = None
    unique_identifiers: ClassVar = OrderedDict(kind="elas-packed")


@dataclass(frozen=True)
class Datasets:
    """Training and validation samples; `valid` is None when validation is off."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None


def build_datasets(config: Config) -> Datasets:
    """Build the datasets on every rank (rank 0 builds the index files, the others wait and map them).

    Args:
        config: validated; `data.*`, `train.steps`, batch sizes and seed decide the order of samples.
    """
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    train_samples = config.train.steps * config.train.global_batch_size
    valid_samples = config.train.eval_batches * config.train.global_batch_size
    train_blend = parse_blend("data.train", config.data.train)
    if config.data.valid is not None:
        blends = dict(blend_per_split=[train_blend, parse_blend("data.valid", config.data.valid), None])
    else:
        blends = dict(blend=train_blend, split=config.data.split)
    settings = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.model.seq_length,
        path_to_cache=config.data.cache or str(Path(config.train.run_dir) / "index-cache"),
        tokenizer=_Tokens(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blends,
    )
    sizes = [train_samples, valid_samples, 0]
    train, valid, _test = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    return Datasets(train, valid if valid_samples else None)


def micro_batches(
    dataset: torch.utils.data.Dataset, config: Config, layout: Layout, *, consumed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This data-parallel rank's micro-batches, from `consumed` samples of the whole run on, until the data ends.

    Yields:
        Tokens and labels, int64 `[micro_batch_size, seq_length]`, on this process's device.
    """
    size, stride = config.train.micro_batch_size, config.train.micro_batch_size * layout.dp
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for start in range(consumed, len(dataset) - stride + 1, stride):
        first = start + layout.dp_rank * size
        samples = [dataset[index] for index in range(first, first + size)]
        tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
        yield tokens.to(device, torch.int64), labels.to(device, torch.int64)
