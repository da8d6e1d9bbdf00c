"""Muon's steps of matrices over sharded weights, after the optimizer has moved their momenta.

Every matrix is gathered on one rank of its stage, moved there, and its parts go back (`elas.engine.exchange`); three
tensors of its size are on the wire, in fp32.
"""

import torch
from torch import Tensor

from elas.config import OptimizerConfig
from elas.engine.engine import Engine
from elas.engine.exchange import Exchange
from elas.engine.matrices import Rows, matrices_of, pairs_of
from elas.engine.zero import Fragment
from elas.optim.muon import moved, spectral_norm


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

    def due(self, step: int) -> bool:
        """False: no step is out of the ordinary."""
        return False

    def begin(self, step: int) -> None:
        """Called before the optimizer's step."""

    @torch.no_grad()
    def end(self, step: int, lr: float) -> None:
        """Move all matrices; called after the optimizer's step, on every rank, unless that was skipped."""
        directions = self.engine.base_optimizer.directions

        def direction(fragment: Fragment) -> Tensor:
            return directions[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.numel)

        for owned in self.exchange.rounds(self.units):
            mine: list[tuple[Tensor, Tensor]] = []
            for unit, owner in owned:
                for rows in unit:
                    weight = self.exchange.gather(rows, Fragment.master, owner)
                    u = self.exchange.gather(rows, direction, owner)
                    if weight is not None and u is not None:
                        mine.append((weight, u))
            new = self._moved(mine, lr)
            for unit, owner in owned:
                is_mine = owner == self.exchange.rank
                for number, rows in enumerate(unit):
                    self.exchange.spread(rows, new[number] if is_mine else None, owner)
        directions.clear()

    def _moved(self, mine: list[tuple[Tensor, Tensor]], lr: float) -> list[Tensor]:
        """New weights of this rank's unit; none if it has none in this round."""
        divisor = 1.0
        if self.config.normalize == "spectron" and len(mine) == 2:
            divisor += sum(float(spectral_norm(weight)) for weight, _ in mine)
        step = {"lr": lr, "weight_decay": self.config.weight_decay, "steps": self.config.muon_steps}
        return [moved(weight, u, **step, divisor=divisor) for weight, u in mine]
