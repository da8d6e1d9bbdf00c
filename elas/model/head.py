"""The output layer and its cross entropy in chunks of tokens, so that tokens × vocabulary never exists at once.

Legend: n tokens of a micro-batch, c tokens of a chunk, h hidden, v this rank's part of the vocabulary, s sequence, b
batch.

Where the weight of each token's loss is known before the backward pass, as in training, the forward pass computes the
gradients too: each chunk's logits `[c, v]` serve the loss, `d hidden` and `d weight`, and are gone. So nothing is
computed twice, and the backward pass only scales. (`torch.nn.functional.linear_cross_entropy` of torch 2.13 does the
same on one rank; it has no vocabulary-parallel form.)

Over tensor-parallel ranks each chunk has two collectives of c values: its largest logit, then the sum of exponentials
together with the label's logit.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from elas.model.loss_chunks import SLICE, chunk_tokens


class _Chunks:
    """Losses of one chunk after another, and what their gradients need, in the same memory.

    Args:
        tokens: n.
        weight: `[v, h]`.
        group: tensor-parallel group.

    Attributes:
        slices: the chunks.
    """

    def __init__(self, tokens: int, weight: torch.Tensor, group: Any):
        size = min(tokens, chunk_tokens(len(weight), weight.device.type))
        self.slices = [slice(first, first + size) for first in range(0, tokens, max(1, size))]
        self._weight, self._group = weight, group
        self._products = weight.new_empty(size, len(weight))
        self._wide = self._products if weight.dtype == torch.float32 else self._products.float()

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """fp32 losses `[c]` of `hidden [c, h]`; a label outside the vocabulary has the loss log Σ exp(logit)."""
        weight, group = self._weight, self._group
        logits = self._wide[: len(hidden)]
        torch.mm(hidden, weight.t(), out=self._products[: len(hidden)])
        if self._wide is not self._products:
            logits.copy_(self._products[: len(hidden)])
        top = logits.amax(-1)
        if group.size() > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits.sub_(top[:, None])
        first = group.rank() * len(weight)
        self._mine = (labels >= first) & (labels < first + len(weight))
        self._places = torch.where(self._mine, labels - first, 0)[:, None]
        predicted = torch.where(self._mine, logits.gather(1, self._places)[:, 0], 0)
        both = torch.stack([logits.exp_().sum(-1), predicted])
        if group.size() > 1:
            dist.all_reduce(both, group=group)
        self._sums = both[0]
        return both[0].log() - both[1]

    def differences(self) -> torch.Tensor:
        """Gradient of the last losses by their logits, times the sum of exponentials: `[c, v]`; only once."""
        found = self._wide[: len(self._sums)]
        found.scatter_add_(1, self._places, torch.where(self._mine, -self._sums, 0)[:, None])
        if self._wide is self._products:
            return found
        return self._products[: len(found)].copy_(found)

    def scales(self, token_weights: torch.Tensor) -> torch.Tensor:
        """Of rows, `[c, 1]` fp32: what `differences` lacks. Applied to narrow tensors instead of the logits."""
        return (token_weights / self._sums)[:, None]


class LinearCrossEntropy(torch.autograd.Function):
    """The weighted sum of losses; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor, group
    ) -> torch.Tensor:
        """`hidden [n, h]`, `weight [v, h]`, `labels [n]`, `token_weights [n]` fp32 → 0-dim fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        chunks = _Chunks(len(hidden), weight, group)
        for part in chunks.slices:
            weights, losses = token_weights[part], chunks.losses(hidden[part], labels[part])
            total += torch.where(weights != 0, losses, 0).mul(weights).sum()
            if not any(wanted):
                continue
            scales, differences = chunks.scales(weights), chunks.differences()
            if of_hidden is not None:
                torch.mul(torch.mm(differences, weight), scales, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, differences.t(), (hidden[part] * scales).to(weight.dtype))
        ctx.gradients, ctx.dtype = (of_hidden, of_weight), weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: torch.Tensor):
        """0-dim gradient → those of hidden and weight; only once, since they are scaled in place."""
        if ctx.gradients is None:
            raise RuntimeError("LinearCrossEntropy: the second backward pass needs a second forward pass")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        if of_hidden is not None:
            of_hidden.mul_(dy)
        if of_weight is not None:
            of_weight = of_weight.mul_(dy).to(ctx.dtype)
        return of_hidden, of_weight, None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total [v, h] += a [v, c] · b [c, h]` in fp32; products of a narrower dtype in slices, to keep them small."""
    if b.dtype == torch.float32:
        total.addmm_(a, b)
        return
    for first in range(0, len(total), SLICE):
        total[first : first + SLICE] += torch.mm(a[first : first + SLICE], b)


def weighted_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor, group
) -> torch.Tensor:
    """`LinearCrossEntropy`, or without a graph, if gradients are off, the same sum."""
    if torch.is_grad_enabled():
        return LinearCrossEntropy.apply(hidden, weight, labels, token_weights, group)
    losses = losses_of_tokens(hidden, weight, labels, group)
    return torch.where(token_weights != 0, losses, 0).mul(token_weights).sum()


def losses_of_tokens(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, group) -> torch.Tensor:
    """fp32 losses `[n]` of `hidden [n, h]`, `weight [v, h]`, `labels [n]`, without a graph."""
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    chunks = _Chunks(len(hidden), weight, group)
    for part in chunks.slices:
        found[part] = chunks.losses(hidden[part], labels[part])
    return found


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which returns losses instead of logits if it is given labels."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ):
        """Megatron's forward, or losses.

        Args:
            input_: `[s, b, h]` (`[s/t, b, h]` with sequence parallelism).
            weight: `[v, h]` of a tied embedding; None: the layer's own.
            runtime_gather_output: Megatron's.
            labels: `[b, s]`; None: return logits.
            token_weights: fp32 `[b, s]`; None: return the loss of each token, `[b, s]`, without a graph.

        Returns:
            With labels and `token_weights`, the 0-dim sum of losses times weights.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        assert weight is not None
        sequence, batch = whole.shape[:2]
        flat, flat_labels = whole.flatten(0, 1), labels.t().reshape(-1)
        if token_weights is None:
            return losses_of_tokens(flat, weight, flat_labels, self.tp_group).view(sequence, batch).t().contiguous()
        weights = token_weights.t().reshape(-1)
        return weighted_sum(flat, weight, flat_labels, weights, self.tp_group)


class LeanGPTModel(GPTModel):
    """Megatron-core's `GPTModel`, whose loss does without logits where their gradient is known or not needed.

    Called with `labels` and `token_weights` it returns the 0-dim weighted sum of losses; with `labels` alone the loss
    of each token `[b, s]`, in chunks if gradients are off, else as Megatron's.

    Attributes:
        with_logits: compute all losses as Megatron does, to compare with.
    """

    with_logits = False
    _token_weights: torch.Tensor | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.post_process:
            # GPTModel names the class of its output layer itself. Ours has the same attributes.
            self.output_layer.__class__ = OutputLayer

    def forward(self, *args, token_weights: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Megatron's forward.

        Args:
            args: Megatron's.
            token_weights: fp32 `[b, s]`, what each token's loss counts in the sum.
            kwargs: Megatron's.
        """
        self._token_weights = token_weights
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._token_weights = None

    def _postprocess(self, hidden_states, *args, labels=None, **kwargs):
        weights = self._token_weights
        chunked = not self.with_logits and (weights is not None or not torch.is_grad_enabled())
        if not self.post_process or labels is None or not chunked:
            found = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
            if not self.post_process or labels is None or weights is None:
                return found
            return torch.where(weights != 0, found, 0).mul(weights).sum()
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, tied, labels=labels, token_weights=weights)
