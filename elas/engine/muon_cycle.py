"""Muon's steps of matrices over sharded weights, after the optimizer has moved their momenta.

Every matrix is gathered on one rank of its stage, moved there, and its parts go back (`elas.engine.exchange`). Its
weights and its direction are summed and its new weights broadcast, in fp32: 12 bytes for each of its numbers, if the
stage has more than one rank.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from elas.config import OptimizerConfig
from elas.engine.engine import Engine
from elas.engine.exchange import Exchange
from elas.engine.matrices import Rows, matrices_of, pairs_of
from elas.engine.zero import Fragment
from elas.optim.muon import moved, spectral_norm

AT_ONCE = 2**24
"""Numbers of all matrices, about, that a rank owns at a time."""


@dataclass(frozen=True)
class MuonReport:
    """What a step of Muon cost."""

    seconds: float
    """The optimizer's share of the step on this rank: momenta, AdamW for all that is no matrix, and matrices."""
    bytes: int
    """Of the tensors exchanged within this rank's stage."""

    def metrics(self) -> dict[str, float]:
        """Entries for metrics.jsonl."""
        return {"optimizer_s": self.seconds, "optimizer_bytes": self.bytes}


class MuonCycle:
    """Moves matrices.

    Args:
        engine: whose optimizer is `elas.optim.muon.Muon`.
        config: weight decay, steps of the iteration, normalisation.
    """

    def __init__(self, engine: Engine, config: OptimizerConfig):
        self.engine, self.config, self.exchange = engine, config, Exchange(engine)
        pairs: list[tuple[Rows, ...]] = list(pairs_of(engine.chunks))
        if config.normalize == "none":
            pairs = [(one,) for pair in pairs for one in pair]
        self.units = [*pairs, *((one,) for one in matrices_of(engine.chunks))]
        sizes = (sum(math.prod(self.exchange.shape(rows)) for rows in unit) for unit in self.units)
        self._at_once = max(1, AT_ONCE // max(sizes, default=1))

    def due(self, step: int) -> bool:
        """False: no step is out of the ordinary."""
        return False

    def begin(self, step: int) -> None:
        """Called before the optimizer's step."""

    @torch.no_grad()
    def end(self, step: int, lr: float) -> MuonReport:
        """Move all matrices; called after the optimizer's step, on every rank, unless that was skipped."""
        begun, sent = time.perf_counter(), self.exchange.sent
        directions = self.engine.base_optimizer.directions

        def direction(fragment: Fragment) -> Tensor:
            return directions[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.numel)

        for owned in self.exchange.rounds(self.units, self._at_once):
            new: list[Tensor] = []
            mine: list[Tensor] = []
            for units, owner in owned:  # all are gathered before any is moved, so that ranks compute at the same time
                wanted = [(rows, values) for unit in units for rows in unit for values in (Fragment.master, direction)]
                mine += self.exchange.gather(wanted, owner)
            for units, owner in owned:
                if owner == self.exchange.rank:
                    given = iter(mine)
                    for unit in units:
                        new += self._moved([(next(given), next(given)) for _ in unit], lr)
            del mine
            for units, owner in owned:
                changed = [rows for unit in units for rows in unit]
                self.exchange.spread(changed, new if owner == self.exchange.rank else (), owner)
        directions.clear()
        seconds = self.engine.base_optimizer.seconds + time.perf_counter() - begun
        return MuonReport(seconds, self.exchange.sent - sent)

    def _moved(self, mine: list[tuple[Tensor, Tensor]], lr: float) -> list[Tensor]:
        """New weights of a unit, from its weights and directions."""
        divisor = 1.0
        if self.config.normalize == "spectron" and len(mine) == 2:
            divisor += sum(float(spectral_norm(weight)) for weight, _ in mine)
        step = {"lr": lr, "weight_decay": self.config.weight_decay, "steps": self.config.muon_steps}
        return [moved(weight, u, **step, divisor=divisor) for weight, u in mine]
