"""LORO's exact steps over sharded factors, and the refresh.

Each pair is gathered in fp32 on one rank of its pipeline stage, by summing the ranks' parts of it: fragments of ZeRO's
partitions as well as tensor-parallel shards. The pairs of a stage are assigned to its ranks round-robin and computed in
parallel; a rank holds at most its own pair and one tensor in transit. The results are broadcast to the stage, and every
rank keeps its part.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from elas.config import OptimizerConfig
from elas.engine.engine import Engine
from elas.engine.zero import base_state, fragments, publish, whole_shape, write_rows
from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear
from elas.model.shards import shard
from elas.optim.loro import corrected, factor_scale, refresh
from elas.optim.riemannian import NotTaken, exact_step
from elas.parallel import stage_group


@dataclass(frozen=True)
class Pair:
    """A factor pair, W = factor_out · factor_in; its part of a stacked factor_in is the rows [first, first + rank)."""

    factor_in: torch.nn.Parameter
    factor_out: torch.nn.Parameter
    first: int
    rank: int


@dataclass(frozen=True)
class ExactReport:
    """Duration and counts of an exact step."""

    seconds: float
    pairs: int
    """Number of pairs in the whole model."""
    not_taken: int
    """Pairs that took the approximate step instead: rank-deficient, or the SVD failed."""

    def metrics(self) -> dict[str, float]:
        """Entries for metrics.jsonl."""
        return {"exact_s": self.seconds, "exact_pairs": self.pairs, "exact_not_taken": self.not_taken}


@dataclass(frozen=True)
class _Moved:
    """A pair's new factors."""

    factors: tuple[Tensor, Tensor]
    """M `[o, r]` and N `[i, r]`."""
    exact: bool
    """Whether they are from the exact step, else from the approximate one."""


def pairs_of(models: Iterable[torch.nn.Module]) -> Iterator[Pair]:
    """Factor pairs of this rank's chunks, in model order."""
    for model in models:
        for module in model.modules():
            if isinstance(module, LowRankColumnParallelLinear):
                for number, factor in enumerate(module.output_factors):
                    yield Pair(module.factor_in, factor, number * module.rank, module.rank)
            elif isinstance(module, LowRankRowParallelLinear):
                yield Pair(module.factor_in, module.factor_out, 0, module.rank)


class LoroCycle:
    """Schedules and takes exact steps and refreshes.

    Args:
        engine: an engine whose optimizer is `elas.optim.loro.Loro`.
        config: `exact_every` and `refresh` set the schedule; betas, eps and weight decay apply to the steps.
    """

    def __init__(self, engine: Engine, config: OptimizerConfig):
        self.engine, self.config = engine, config
        self.group = stage_group()
        self.ranks = dist.get_process_group_ranks(self.group)
        self.pairs = list(pairs_of(engine.chunks))
        self.factor_scale = factor_scale(engine.config.low_rank.rank, engine.config.model.hidden_size)

    def due(self, step: int) -> bool:
        """Whether an exact step or a refresh is due at this step."""
        return self.config.exact_every is not None and step % self.config.exact_every == 0

    def begin(self, step: int) -> None:
        """Call before the optimizer step. If an exact step is due, the optimizer then updates only the moments."""
        self.engine.base_optimizer.moments_only = self.due(step) and self.config.refresh != "only"

    def end(self, step: int, lr: float) -> ExactReport | None:
        """Call after the optimizer step, with its learning rate; takes the exact step and the refresh if due."""
        if not self.due(step):
            return None
        report = self._exact(lr) if self.config.refresh != "only" else None
        if self.config.refresh != "none":
            refresh(base_state(self.engine).values())
        return report

    @torch.no_grad()
    def _exact(self, lr: float) -> ExactReport:
        start = time.perf_counter()
        held, state = fragments(self.engine), base_state(self.engine)
        steps_since_refresh = float(next(iter(state.values()))["step"])
        lr_t = corrected(lr, (self.config.beta1, self.config.beta2), steps_since_refresh)
        not_taken = 0
        for first in range(0, len(self.pairs), len(self.ranks)):
            owned = list(zip(self.pairs[first : first + len(self.ranks)], self.ranks))
            mine: list[Tensor] = []
            for (pair, owner), kind in itertools.product(owned, ("m", "n", "d_m", "d_n")):
                whole = self._gather(pair, kind, owner, held, state)
                if whole is not None:
                    mine.append(whole)
            result = self._move(mine, lr, lr_t) if mine else None
            del mine, whole  # a rank holds one pair at a time
            for pair, owner in owned:
                not_taken += self._spread(pair, owner, result, held)
        publish(self.engine)
        counts = torch.tensor([len(self.pairs), not_taken], device=torch.cuda.current_device())
        dist.all_reduce(counts, group=mpu.get_pipeline_model_parallel_group())
        return ExactReport(time.perf_counter() - start, int(counts[0]), int(counts[1]))

    def _move(self, pair: list[Tensor], lr: float, lr_t: float) -> _Moved:
        """One step of M `[o, r]` and N `[i, r]`; `pair` is these and their directions."""
        m, n, d_m, d_n = pair
        try:
            return _Moved(exact_step(m, n, d_m, d_n, lr_t), True)
        except NotTaken:
            keep, scale = 1 - lr * self.config.weight_decay, lr_t * self.factor_scale
            return _Moved((keep * (m - scale * d_m), keep * (n - scale * d_n)), False)

    def _gather(self, pair: Pair, kind: str, owner: int, held: dict, state: dict) -> Tensor | None:
        """The whole M `[o, r]`, N `[i, r]`, D_M or D_N of a pair in fp32, on its owner; None on other ranks."""
        parameter = pair.factor_out if kind.endswith("m") else pair.factor_in
        local = torch.zeros(self._local_shape(parameter), dtype=torch.float32, device=torch.cuda.current_device())
        fragment = held.get(parameter)
        if fragment is not None and self._contributes(parameter):
            values = fragment.master()
            if kind.startswith("d_"):
                root = fragment.moment(state, "exp_avg_sq").sqrt().add_(self.config.eps)
                values = fragment.moment(state, "exp_avg") / root
            local.view(-1).narrow(0, fragment.start, fragment.numel).copy_(values)
        if parameter is pair.factor_in:
            local = local[pair.first : pair.first + pair.rank]
        whole = self._placed(parameter, local)
        whole = (whole.T if parameter is pair.factor_in else whole).contiguous()
        dist.reduce(whole, dst=owner, group=self.group)
        return whole if owner == dist.get_rank() else None

    def _local_shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return whole_shape(parameter, self.engine.stage)

    def _contributes(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank contributes its part to the sum; of replicas, only one does."""
        layout = self.engine.layout
        replicated = not getattr(parameter, "tensor_model_parallel", False)
        return not ((replicated and layout.tp_rank > 0) or (self.engine.stage == 0 and layout.dp_rank > 0))

    def _placed(self, parameter: torch.nn.Parameter, local: Tensor) -> Tensor:
        """The whole tensor with this rank's tensor-parallel shard in place and zeros elsewhere."""
        layout = self.engine.layout
        if layout.tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
            return local
        marked: Any = parameter
        dim, before, after = marked.partition_dim, list(local.shape), list(local.shape)
        size = local.shape[dim]
        before[dim], after[dim] = layout.tp_rank * size, (layout.tp - 1 - layout.tp_rank) * size
        return torch.cat([local.new_zeros(before), local, local.new_zeros(after)], dim)

    def _spread(self, pair: Pair, owner: int, result: _Moved | None, held: dict) -> int:
        """Broadcast a pair's new factors to the stage; returns 1 if the exact step was not taken, else 0."""
        layout, device = self.engine.layout, torch.cuda.current_device()
        mine = result if owner == dist.get_rank() else None
        taken = torch.tensor([0 if mine is None else int(mine.exact)], device=device)
        dist.broadcast(taken, src=owner, group=self.group)
        for number, parameter in enumerate((pair.factor_out, pair.factor_in)):
            long = self._local_shape(parameter)[number]  # M [o, r] and the rows [r, i] of N's transpose
            if getattr(parameter, "tensor_model_parallel", False):
                long *= layout.tp
            value = torch.empty(long, pair.rank, device=device) if mine is None else mine.factors[number].contiguous()
            dist.broadcast(value, src=owner, group=self.group)
            rows, first = (value.T, pair.first) if parameter is pair.factor_in else (value, 0)
            rows = shard(rows, parameter, layout.tp, layout.tp_rank).contiguous()
            write_rows(self.engine, parameter, held.get(parameter), rows, first)
        return 1 - int(taken)
