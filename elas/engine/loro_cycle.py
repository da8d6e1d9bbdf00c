"""LORO's exact steps over sharded factors, and the refresh.

Each pair is gathered on one rank of its pipeline stage, moved there, and goes back (`elas.engine.exchange`).
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from elas.config import OptimizerConfig
from elas.engine.engine import Engine
from elas.engine.exchange import Exchange
from elas.engine.matrices import pairs_of
from elas.engine.zero import Fragment, base_state
from elas.optim.loro import corrected, factor_scale, refresh
from elas.optim.riemannian import NotTaken, exact_step


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


class LoroCycle:
    """Schedules and takes exact steps and refreshes.

    Args:
        engine: an engine whose optimizer is `elas.optim.loro.Loro`.
        config: `exact_every` and `refresh` set the schedule; betas, eps and weight decay apply to the steps.
    """

    def __init__(self, engine: Engine, config: OptimizerConfig):
        self.engine, self.config, self.exchange = engine, config, Exchange(engine)
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
        state = base_state(self.engine)
        steps_since_refresh = float(next(iter(state.values()))["step"])
        lr_t = corrected(lr, (self.config.beta1, self.config.beta2), steps_since_refresh)

        def direction(fragment: Fragment) -> Tensor:
            root = fragment.moment(state, "exp_avg_sq").sqrt().add_(self.config.eps)
            return fragment.moment(state, "exp_avg") / root

        not_taken = 0
        self.exchange.begin()
        for owned in self.exchange.rounds(self.pairs):  # a rank has one pair at a time
            sources = (Fragment.master, direction)
            wanted = [([(rows, one) for one in sources for rows in pair], owner) for (pair,), owner in owned]
            mine, result = self.exchange.gather(wanted), None
            if mine:  # M [o, r], N [i, r] and their directions
                m, n, d_m, d_n = mine
                result = self._move([m, n.T.contiguous(), d_m, d_n.T.contiguous()], lr, lr_t)
                del m, n, d_m, d_n
            del mine
            for ((out, into),), owner in owned:
                new = result if owner == self.exchange.rank else None
                not_taken += self._is_not_taken(new, owner)
                self.exchange.spread((out, into), () if new is None else (new.factors[0], new.factors[1].T), owner)
        self.exchange.publish()
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

    def _is_not_taken(self, mine: _Moved | None, owner: int) -> int:
        """1 if the owner of a pair did not take the exact step, else 0; the same on every rank of the stage."""
        taken = torch.tensor([0 if mine is None else int(mine.exact)], device=torch.cuda.current_device())
        dist.broadcast(taken, src=owner, group=self.exchange.group)
        return 1 - int(taken)
