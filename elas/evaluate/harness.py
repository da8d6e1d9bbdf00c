"""A checkpoint as a model of lm-evaluation-harness, which is optional: `pip install 'elas[eval]'`.

The harness's own class for transformers' models does all of the scoring, on the model that an export would hold and
with the tokenizer that an export would have, so scores are those of `lm_eval --model hf` on the export.

    import elas.evaluate.harness  # registers the name
    lm_eval.simple_evaluate(model="elas", model_args="checkpoint=runs/60m", tasks=["arc_easy"])
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from elas.accelerator import device as this_device
from elas.console import Console
from elas.data.tokenizer.found import document_ids
from elas.data.tokenizer.huggingface import auto_tokenizer
from elas.errors import UserError
from elas.hf.source import Source, source_of
from elas.hf.tokenizer import write_tokenizer

_HFLM: Any = HFLM  # `register_model`, which decorates it, gives it the type of the abstract base class


class ElasLM(_HFLM):
    """A run's folder, a checkpoint, or a Hugging Face folder.

    Args:
        checkpoint: its path.
        tokenizer: a path; None for the run's, or the one in the folder.
        dtype: of the weights; None for that of training, or of the folder.
        rank, world: of data-parallel processes, whose process group exists; each takes a part of the documents.
        arguments: of `lm_eval.models.huggingface.HFLM`, such as `batch_size`.

    Raises:
        UserError: no intact model or no tokenizer.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        tokenizer: str | None = None,
        dtype: str | None = None,
        rank: int = 0,
        world: int = 1,
        **arguments: Any,
    ):
        source = source_of(Path(checkpoint))
        if rank == 0:
            for line in source.passed_over:
                Console().say(f"skipped {line}")
        arguments.pop("device", None)  # the harness gives it; the model goes to this process's
        model = source.model(getattr(torch, dtype) if dtype else None, str(this_device()))
        found = harness_tokenizer(source, tokenizer, model)
        if source.checkpoint is not None:  # an export has them: else texts in a batch would go on after their end
            for role in ("bos", "eos", "pad"):
                setattr(model.generation_config, f"{role}_token_id", getattr(found, f"{role}_token_id"))
        super().__init__(model, backend="causal", tokenizer=found, **arguments)
        self._rank, self._world_size = rank, world
        self.source = source

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, one after the other, `[world]` for scalars."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


register_model("elas")(ElasLM)  # not as a decorator, for the same reason


def harness_tokenizer(source: Source, given: str | None, model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' class, as an export would have it.

    Raises:
        UserError: there is none, or it has no such form.
    """
    if source.checkpoint is None and given is None and (source.path / "tokenizer.json").is_file():
        return auto_tokenizer(source.path)
    path = source.tokenizer(given).path
    with tempfile.TemporaryDirectory(prefix="elas-tokenizer-") as folder:
        eod = document_ids(source.config)[1] if source.config else None
        write_tokenizer(path, Path(folder), model.config.max_position_embeddings, eod)
        found = auto_tokenizer(Path(folder))
    if found.eos_token_id is None and found.bos_token_id is None:
        raise UserError(f"tokenizer {path}: has neither a first nor a last token, one of which tasks begin with")
    return found
