"""The Megatron-core model of a checkpoint, forward only, on the layout of this process's groups.

Legend: b batch, s sequence, v vocabulary.
"""

import functools

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.weights import load_weights
from elas.config import Config
from elas.model.activation import set_step
from elas.model.provider import build_chunks
from elas.parallel import Layout


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
        set_step(self._chunks, checkpoint.step)  # 2:4 as in the last trained step
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
        def forward_step(_iterator, model):
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            output = model(tokens, positions, None, labels=labels)
            return output, lambda result: (result.sum(), {"output": result})

        many = len(self._chunks) > 1
        # An interleaved schedule takes micro-batches in multiples of the stages: the others repeat the first.
        count = self.layout.pp if many else 1
        schedule = functools.partial(
            get_forward_backward_func(),
            forward_step_func=forward_step,
            data_iterator=[iter(()) for _ in self._chunks] if many else iter(()),
            model=self._chunks if many else self._chunks[0],
            num_microbatches=count,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
        results = schedule()
        return results[0]["output"] if results else None
