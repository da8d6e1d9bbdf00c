"""Gradient reductions other than ZeRO's data-parallel one, the gradient norm, and fp32 accumulation.

Two reductions follow from how Megatron shards a model. Under sequence parallelism a replicated parameter sees only its
rank's tokens, so its gradient is a partial sum over the tensor-parallel group. With tied embeddings under a pipeline,
the first and the last stage each hold a part of the gradient.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from elas.parallel import data_group, model_group, tensor_group

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def is_sequence_partial(parameter: torch.nn.Parameter) -> bool:
    """Whether the gradient is a partial sum over tensor-parallel ranks."""
    return bool(getattr(parameter, "sequence_parallel", False))


def sum_sequence_partial(models: Iterable[torch.nn.Module]) -> None:
    """Sum partial gradients over the tensor-parallel group, with one collective per dtype."""
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for model in models:
        for parameter in model.parameters():
            if is_sequence_partial(parameter) and parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat, group=tensor_group())
        for grad, total in zip(grads, _unflatten_dense_tensors(flat, grads)):
            grad.copy_(total)


def sum_sequence_partial_in_backward(models: Iterable[torch.nn.Module]) -> None:
    """Like `sum_sequence_partial`, but in a hook on each parameter, before DeepSpeed reads the gradient.

    For ZeRO 2 and 3, which reduce gradients during the backward pass. Costs one collective per parameter and
    micro-batch.
    """
    group = tensor_group()
    if dist.get_world_size(group) == 1:
        return

    def total(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=group)
        return grad

    for model in models:
        for parameter in model.parameters():
            if is_sequence_partial(parameter):
                parameter.register_hook(total)


def fill_missing(models: Iterable[torch.nn.Module]) -> None:
    """Give zero gradients to parameters without one: passes were abandoned here, but the other ranks reduce theirs."""
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def sum_tied_embeddings(models: "Iterable[GPTModel]") -> None:
    """Sum the gradients of the first stage's embedding and the last stage's copy of it."""
    if mpu.get_pipeline_model_parallel_world_size() == 1 or not mpu.is_rank_in_embedding_group(ignore_virtual=True):
        return
    for model in models:
        if (model.pre_process or model.post_process) and model.share_embeddings_and_output_weights:
            dist.all_reduce(model.shared_embedding_or_output_weight().grad, group=mpu.get_embedding_group())


def grad_norm(models: Iterable[torch.nn.Module]) -> torch.Tensor:
    """Global L2 norm of reduced gradients; each parameter is counted once over tensor- and pipeline-parallel ranks.

    Returns:
        0-dim fp32 tensor, the same on every rank.
    """
    first = mpu.get_tensor_model_parallel_rank() == 0
    total = None
    for model in models:
        for parameter in model.parameters():
            if parameter.grad is None or getattr(parameter, "ds_pipe_replicated", False):
                continue
            if first or getattr(parameter, "tensor_model_parallel", False):
                square = parameter.grad.float().square().sum()
                total = square if total is None else total + square
    if total is None:
        total = torch.zeros((), device=torch.cuda.current_device())
    dist.all_reduce(total, group=model_group())
    return total.sqrt()


def average_over_data_parallel(models: Iterable[torch.nn.Module]) -> None:
    """Average gradients over the data-parallel group (ZeRO 0, where DeepSpeed holds no gradients of its own)."""
    group = data_group()
    size = dist.get_world_size(group)
    if size == 1:
        return
    grads = [p.grad for model in models for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.float().reshape(-1) for grad in grads]).div_(size)
    dist.all_reduce(flat, group=group)
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()


def clip_scale(norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """The factor that scales gradients with this norm to a norm of at most `limit`; None for a limit of 0."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else None


class Fp32Accumulation:
    """Accumulates bf16 gradients of micro-batches in fp32.

    A bf16 sum drops addends 256 times smaller than itself, so later micro-batches would have no effect. Costs 4 bytes
    per parameter. The total is rounded once, in `hand_over`.

    Args:
        models: models whose gradients to accumulate; from then on a backward pass leaves `grad` None.
    """

    def __init__(self, models: Iterable[torch.nn.Module]):
        self._totals: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._fresh: set[torch.nn.Parameter] = set()
        for model in models:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: torch.nn.Parameter) -> None:
        grad = parameter.grad
        assert grad is not None  # the hook runs after it was accumulated
        if parameter in self._fresh:
            self._totals[parameter].add_(grad)
        elif parameter in self._totals:
            self._totals[parameter].copy_(grad)
        else:
            self._totals[parameter] = grad.float()
        self._fresh.add(parameter)
        parameter.grad = None

    def hand_over(self) -> None:
        """Move the totals into `grad`, rounded to its dtype, and start the next sum."""
        for parameter in self._fresh:
            parameter.grad = self._totals[parameter].to(parameter.dtype)
        self._fresh.clear()


def all_finite(weights: list[torch.Tensor]) -> bool:
    """Whether every value of every rank's `weights` (any shapes and dtypes) is finite; the same on every rank."""
    worst = torch.stack([w.abs().max().float() if w.numel() else w.new_zeros(()).float() for w in weights]).max()
    finite = torch.isfinite(worst).to(torch.int32)  # max propagates NaN
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)
