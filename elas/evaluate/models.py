"""The losses of a model, from a checkpoint by Megatron-core on any layout, or from a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from elas.checkpoint.choose import find
from elas.checkpoint.folder import MANIFEST, Checkpoint, read_checkpoint, unusable
from elas.config import Config, ParallelConfig
from elas.console import Console
from elas.errors import UserError
from elas.hf.build import open_folder

if TYPE_CHECKING:  # these import Megatron-core
    from elas.evaluate.forward import Forward
    from elas.parallel import Layout

_TRIES = 3


class HuggingFace:
    """The losses of transformers' model, whole on every rank.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        embedding: Any = self._model.get_input_embeddings()
        return embedding.num_embeddings

    @property
    def longest(self) -> int | None:
        """Longest sequence; None if the model says nothing."""
        return getattr(self._model.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self._model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def losses(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each label in nats, fp32 `[b, s]`; as `elas.evaluate.forward.Forward.losses`."""
        logits = self._model(tokens, use_cache=False).logits
        cross_entropy = torch.nn.functional.cross_entropy  # row by row: an fp32 copy of all logits may be large
        return torch.stack([cross_entropy(row.float(), label, reduction="none") for row, label in zip(logits, labels)])


def open_huggingface(folder: Path, dtype: str | None, device: torch.device) -> HuggingFace:
    """The model of a Hugging Face folder; raises `UserError` if there is none."""
    return HuggingFace(open_folder(folder, getattr(torch, dtype) if dtype else "auto", str(device)))


def evaluation_config(config: Config, parallel: ParallelConfig, dtype: str | None, seq_length: int) -> Config:
    """A run's configuration for evaluation: another layout, dtype and length, and no settings of DeepSpeed's."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, seq_length=seq_length),
        parallel=parallel,
        train=dataclasses.replace(config.train, dtype=dtype or config.train.dtype),
    )


def open_checkpoint(
    given: Path, checkpoint: Checkpoint, config: Config, layout: "Layout", console: Console
) -> tuple["Forward", Checkpoint]:
    """Load a checkpoint while its run may go on and remove it; every rank calls it.

    A run's folder, given by its path, always has a newer one then, which is taken. All ranks take the one that rank 0
    found: a run may write one between two ranks' looking.

    Args:
        given: what the user gave.
        checkpoint: found there.
        config: from `evaluation_config`.
        layout: of the ranks.
        console: rank 0's, for a line on what happened.

    Raises:
        UserError: it is damaged, or was removed.
    """
    from elas.evaluate.forward import Forward

    for _ in range(_TRIES):
        path = Path(_of_rank_0(str(checkpoint.path)))
        found = checkpoint if path == checkpoint.path else read_checkpoint(path)
        try:
            if isinstance(found, Checkpoint):
                return Forward(found, config, layout), found
            why = UserError(f"{path}: {found}; give another checkpoint")
        except UserError as error:
            why = error
        if _of_rank_0((path / MANIFEST).exists()):
            raise why
        removed = "was removed while it was being read (a run keeps only its newest, checkpoint.keep)"
        if path.resolve() == given.resolve():
            raise unusable(path, removed, "give a newer one, or the run's folder") from why
        if layout.rank == 0:
            console.say(f"{path} {removed}: taking the newest")
        checkpoint = find(given)
    raise unusable(given, "its checkpoints are removed faster than they can be read", "copy one, and give the copy")


def _of_rank_0(value):
    """Rank 0's value, on every rank."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
