"""The Megatron-core model of a checkpoint, forward only, on the layout of this process's groups.

Legend: b batch, s sequence, v vocabulary.
"""

import functools
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.weights import load_weights
from elas.config import Config
from elas.model.activation import set_step
from elas.model.provider import build_chunks
from elas.parallel import Layout

_MicroBatch = tuple[torch.Tensor, torch.Tensor | None]


class Forward:
    """Losses and logits of a checkpoint; every rank makes it and calls its methods.

    Args:
        checkpoint: of any layout.
        config: the checkpoint's, with the layout and dtype to evaluate in.
        layout: from `elas.parallel.initialize`.

    Raises:
        UserError: a file of the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, layout: Layout):
        self.config, self.layout = config, layout
        self._chunks = build_chunks(config)
        load_weights(self._chunks, layout, checkpoint)
        set_step(self._chunks, max(1, checkpoint.step))  # 2:4 as in the last trained step, or as in the first to come
        for chunk in self._chunks:
            chunk.eval()

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Round the weights to another dtype's values; their own dtype stays."""
        for chunk in self._chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(dtype))

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Loss of each label in nats, fp32 `[b, s]`; None on ranks without the last pipeline stage.

        Args:
            tokens: int64 `[b, s]`; s is the same for all ranks and calls of a pipeline, and divisible by the
                tensor-parallel size with sequence parallelism.
            labels: `[b, s]`; whatever stands where nothing is to predict must be a valid id, and its loss is ignored.
        """
        return self._run(tokens, labels)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits `[b, s, v / tp]` of this rank's part of the vocabulary; None without the last pipeline stage."""
        return self._run(tokens, None)

    def _run(self, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        rows, parts = self._micro_batches(tokens, labels)

        def forward_step(iterator, model):
            tokens, labels = next(iterator)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            output = model(tokens, positions, None, labels=labels)
            return output, lambda result: (result.sum(), {"output": result})

        many = len(self._chunks) > 1
        iterators = [iter(parts) for _ in self._chunks]
        model: Any = self._chunks if many else self._chunks[0]
        schedule = functools.partial(
            get_forward_backward_func(),
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=model,
            num_microbatches=len(parts),
            seq_length=tokens.shape[1],
            micro_batch_size=parts[0][0].shape[0],
            forward_only=True,
        )
        results = schedule()
        return torch.cat([result["output"] for result in results])[:rows] if results else None

    def _micro_batches(self, tokens: torch.Tensor, labels: torch.Tensor | None) -> tuple[int, list[_MicroBatch]]:
        """Cut a batch into one micro-batch for each pipeline stage, so that the stages work at the same time.

        All micro-batches must have the same size (and with interleaving their number must be a multiple of the
        stages), so the last row is repeated at the end; its results are cut off.

        Returns:
            Rows of the batch, and the micro-batches.
        """
        rows, count = len(tokens), self.layout.pp
        size = -(-rows // count)
        places = torch.arange(size * count, device=tokens.device).clamp(max=rows - 1)
        tokens, labels = tokens[places], None if labels is None else labels[places]
        cut = [None] * count if labels is None else labels.split(size)
        return rows, list(zip(tokens.split(size), cut))
