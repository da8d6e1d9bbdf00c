"""Locates a parameter's fp32 weights and moments on this rank, at every ZeRO stage.

ZeRO keeps flat fp32 partitions. A rank holds one range of a parameter's flattened tensor (of its tensor-parallel
shard), or none of it. A `Fragment` is that range, as views into DeepSpeed's own buffers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from elas.engine.engine import Engine


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter, held at `flat[offset : offset + numel]`."""

    flat: Tensor
    """The fp32 tensor that the base optimizer updates; also the key of its state."""
    offset: int
    start: int
    numel: int

    def master(self) -> Tensor:
        """fp32 weights: a view `[numel]`."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def moment(self, state: dict, name: str) -> Tensor:
        """One entry of the base optimizer's state: a view `[numel]`."""
        return state[self.flat][name].view(-1).narrow(0, self.offset, self.numel)


def local_weights(parameter: torch.nn.Parameter, stage: int, dp_rank: int) -> Tensor:
    """What this rank holds of a parameter's weights: its flat partition at ZeRO 3, all of its shard otherwise.

    Without the padding of the last ranks' partitions, which DeepSpeed leaves uninitialised: it may hold NaNs.
    """
    if stage < 3:
        return parameter.data
    held = _partitioned(parameter).ds_tensor.view(-1)
    whole = _partitioned(parameter).ds_numel
    return held[: max(0, whole - dp_rank * held.numel())]


def whole_shape(parameter: torch.nn.Parameter, stage: int) -> tuple[int, ...]:
    """Shape of this rank's tensor-parallel shard; at ZeRO 3 the parameter itself is empty between passes."""
    return tuple(_partitioned(parameter).ds_shape if stage == 3 else parameter.shape)


def _partitioned(parameter: torch.nn.Parameter) -> Any:
    """A parameter of ZeRO 3, which has DeepSpeed's `ds_tensor`, `ds_shape` and `ds_numel`."""
    return parameter


def base_state(engine: "Engine") -> dict:
    """The base optimizer's state, keyed by the tensors it updates; ZeRO rearranges its parameter groups."""
    optimizer = engine.deepspeed.optimizer
    return (optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer).state


def fragments(engine: "Engine") -> dict[torch.nn.Parameter, Fragment]:
    """This rank's fragments by parameter; parameters without elements on this rank are left out."""
    return {parameter: one for parameter, one in homes(engine).items() if one.numel > 0}


def homes(engine: "Engine") -> dict[torch.nn.Parameter, Fragment]:
    """The same of all parameters; one without elements on this rank has an empty range of a flat tensor."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        return _stage3(engine)
    if engine.stage > 0:
        return _stages_1_and_2(optimizer)
    if hasattr(optimizer, "fp32_groups"):
        pairs = [pair for both in zip(optimizer.fp16_groups, optimizer.fp32_groups) for pair in zip(*both)]
    else:
        pairs = [(p, p) for group in optimizer.param_groups for p in group["params"]]
    return {p: Fragment(master, 0, 0, p.numel()) for p, master in pairs}


def _stages_1_and_2(optimizer) -> dict[torch.nn.Parameter, Fragment]:
    found = {}
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        size = flat.numel()
        first = dist.get_rank(optimizer.real_dp_process_group[group]) * size
        # These give the order in memory, including gaps; `bit16_groups` and `_hp_mapping` ignore
        # round_robin_gradients.
        members, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(members, offsets, strict=True):
            start, end = max(first, offset), min(first + size, offset + parameter.numel())
            here = Fragment(flat, start - first, start - offset, end - start)
            found[parameter] = here if start < end else Fragment(flat, 0, 0, 0)
    return found


def _stage3(engine: "Engine") -> dict[torch.nn.Parameter, Fragment]:
    optimizer, found = engine.deepspeed.optimizer, {}
    for chunk in engine.chunks:
        for p in chunk.parameters():
            group, offset, held = optimizer.grad_position[optimizer.get_param_id(p)]
            whole, part = _partitioned(p).ds_numel, _partitioned(p).ds_tensor.numel()
            start = engine.layout.dp_rank * part
            numel = min(held, part, whole - start)  # the last ranks hold padding
            flat = optimizer.fp32_partitioned_groups_flat[group]
            found[p] = Fragment(flat, offset, start, numel) if numel > 0 else Fragment(flat, 0, 0, 0)
    return found


def write_rows(
    engine: "Engine", parameter: torch.nn.Parameter, fragment: Fragment | None, rows: Tensor, first: int
) -> None:
    """Write new rows into this rank's fp32 fragment and into the model's weights.

    Args:
        engine: the engine.
        parameter: of the model.
        fragment: the parameter's fragment on this rank, or None.
        rows: fp32 `[n, columns]`, rows of this rank's tensor-parallel shard.
        first: index of the first row in the shard.
    """
    begin = first * rows.shape[1]
    if fragment is not None:
        low = max(begin, fragment.start)
        high = min(begin + rows.numel(), fragment.start + fragment.numel)
        if low < high:
            new = rows.reshape(-1)[low - begin : high - begin]
            fragment.master()[low - fragment.start : high - fragment.start].copy_(new)
            if engine.stage == 3:
                held = local_weights(parameter, 3, engine.layout.dp_rank)
                held[low - fragment.start : high - fragment.start].copy_(new)
    if engine.stage < 3:
        parameter.data[first : first + rows.shape[0]].copy_(rows)


def publish(engine: "Engine") -> None:
    """After `write_rows` at ZeRO 3, gather again the parameters kept whole on every rank; every rank must call it."""
    if engine.stage < 3:
        return
    whole = engine.deepspeed.optimizer.persistent_parameters
    if whole:
        whole[0].partition(whole, has_been_updated=False)
        whole[0].all_gather(whole)
