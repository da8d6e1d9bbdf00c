"""Whether an exported folder computes what the checkpoint does: logits and perplexity of the two on the same tokens."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from elas.checkpoint.folder import Checkpoint
from elas.config import Config, ParallelConfig
from elas.evaluate.forward import Forward
from elas.hf.build import open_folder
from elas.parallel import initialize, shut_down


@dataclass(frozen=True)
class Compared:
    """Two models on the same tokens.

    Attributes:
        max_logit_diff: largest absolute difference of a logit.
        ppl_ours: perplexity of the checkpoint, by Megatron-core's model.
        ppl_exported: perplexity of the folder, by transformers'.
        tokens: predicted.
    """

    max_logit_diff: float
    ppl_ours: float
    ppl_exported: float
    tokens: int


def compare(
    checkpoint: Checkpoint, config: Config, folder: Path, tokens: torch.Tensor, rounded: torch.dtype | None
) -> Compared:
    """Run both models in fp32 and with plain operations, so that they differ by what the export did.

    One of them is in memory at a time. With a fused kernel, which sums in another order, a few of a million groups of
    four would keep another feature where the second and the third are equal to within rounding, and 2:4 turns that
    into a visible difference.

    Args:
        checkpoint: of any layout.
        config: the checkpoint's.
        folder: exported.
        tokens: int64 `[b, s + 1]`.
        rounded: round the checkpoint's weights to this dtype first, as the folder's are; None leaves them fp32.
    """
    alone = dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        train=dataclasses.replace(config.train, dtype="float32"),
        sparsity=dataclasses.replace(config.sparsity, ffn_memory="eager", implementation="auto"),
    )
    layout = initialize(alone.parallel, seed=config.train.seed)
    ours = _ours(Forward(checkpoint, alone, layout), tokens[:, :-1], rounded)
    shut_down()
    theirs = _theirs(folder, tokens[:, :-1])
    labels = tokens[:, 1:].flatten()
    return Compared(
        max_logit_diff=float((ours - theirs).abs().max()),
        ppl_ours=_perplexity(ours, labels),
        ppl_exported=_perplexity(theirs, labels),
        tokens=labels.numel(),
    )


def sample_tokens(files, count: int, length: int) -> torch.Tensor:
    """`count` stretches of a corpus, spread over it: int64 `[n, length + 1]`, n ≤ count."""
    tokens = np.memmap(f"{files.prefix}.bin", dtype=files.dtype, mode="r")
    count = max(1, min(count, len(tokens) // (length + 1)))
    starts = np.linspace(0, max(0, len(tokens) - length - 1), count).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in starts]))


def _ours(model: Forward, tokens: torch.Tensor, rounded: torch.dtype | None) -> torch.Tensor:
    if rounded is not None:
        model.round_weights(rounded)
    return torch.cat([_logits(model, row) for row in tokens])


def _logits(model: Forward, row: torch.Tensor) -> torch.Tensor:
    logits = model.logits(row[None])
    assert logits is not None  # the only process holds the last pipeline stage
    return logits.float().cpu()


@torch.no_grad()
def _theirs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = open_folder(folder, torch.float32)
    return torch.cat([model(row[None]).logits for row in tokens])


def _perplexity(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).item())
