"""Muon's steps of matrices over sharded weights, within the optimizer's step, after their momenta.

Every matrix's direction is gathered on one rank of its stage, orthogonalized there, and its parts go back to whoever
holds them (`elas.engine.exchange`), before ZeRO spreads the new weights as after any optimizer's step. Of R ranks one
sends about 4/R bytes for each number of a matrix, and 4 for each that it holds a part of.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elas.config import OptimizerConfig
from elas.engine.exchange import Exchange, Values
from elas.engine.matrices import Rows, matrices_of, pairs_of
from elas.engine.zero import Fragment
from elas.errors import ConfigError
from elas.optim.muon import apply_step, matrix_steps, spectral_norms

if TYPE_CHECKING:
    from elas.engine.engine import Engine

AT_ONCE = 2**24
"""Numbers of all matrices, about, that a rank owns at a time."""


@dataclass(frozen=True)
class MuonReport:
    """What a step of Muon cost."""

    seconds: float
    """The optimizer's share of the step on this rank: momenta, AdamW for all that is no matrix, and matrices."""
    bytes: int
    """That this rank sent to others of its stage to move matrices."""
    lr_other: float
    """Learning rate of what is no matrix."""

    def metrics(self) -> dict[str, float]:
        """Entries for metrics.jsonl."""
        return {"optimizer_s": self.seconds, "optimizer_bytes": self.bytes, "lr_other": self.lr_other}


class MuonCycle:
    """Moves matrices when the optimizer asks for it.

    Args:
        engine: whose optimizer is `elas.optim.muon.Muon`; built but for its first step.
        config: weight decay, steps of the iteration, normalisation.

    Raises:
        ConfigError: spectron, and ZeRO 3 steps the factors of a pair at different times.
    """

    def __init__(self, engine: "Engine", config: OptimizerConfig):
        self.engine, self.config, self.exchange = engine, config, Exchange(engine)
        self.hidden_size = engine.config.model.hidden_size
        pairs: list[tuple[Rows, ...]] = list(pairs_of(engine.chunks))
        self.spectron = config.normalize == "spectron" and bool(pairs)
        if not self.spectron:
            pairs = [(one,) for pair in pairs for one in pair]
        self.units = [*pairs, *((one,) for one in matrices_of(engine.chunks))]
        self._sent = 0
        self.exchange.begin()
        apart = any(len({id(self._flat(rows)) for rows in unit}) > 1 for unit in self.units)
        if engine.stage == 3 and apart:  # without ZeRO every parameter is a tensor of its own, moved in one step
            why = "divides a pair by the norms of both factors, which are in different sub-groups of ZeRO 3"
            raise ConfigError("optimizer.normalize", "spectron", why, "set zero_optimization.sub_group_size higher")
        engine.base_optimizer.move_matrices = self._move

    def due(self, step: int) -> bool:
        """False: no step is out of the ordinary."""
        return False

    def begin(self, step: int) -> None:
        """Called before the optimizer's step."""

    def end(self, step: int, lr: float) -> MuonReport:
        """What the optimizer's step cost; called after it, on every rank, unless it was skipped."""
        optimizer, sent = self.engine.base_optimizer, self.exchange.sent
        other = lr if self.config.lr_other is None else lr * self.config.lr_other / self.config.lr
        report = MuonReport(optimizer.seconds, sent - self._sent, other)
        optimizer.seconds, self._sent = 0.0, sent
        return report

    @torch.no_grad()
    def _move(self, lr: float) -> None:
        """Move the matrices that the optimizer has directions of; every rank of the stage has those of the same."""
        directions = self.engine.base_optimizer.directions

        def direction(fragment: Fragment) -> Tensor:
            return directions[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.numel)

        sources: tuple[Values, ...] = (direction, Fragment.master) if self.spectron else (direction,)
        self.exchange.begin()
        units = [unit for unit in self.units if self._flat(unit[0]) in directions]
        sizes = (sum(math.prod(self.exchange.shape(rows)) for rows in unit) for unit in units)
        at_once = max(1, AT_ONCE // max(sizes, default=1))
        for owned in self.exchange.rounds(units, at_once):
            wanted = [
                ([(rows, one) for unit in units for one in sources for rows in unit], owner) for units, owner in owned
            ]
            owned_here = next((units for units, owner in owned if owner == self.exchange.rank), [])
            new = self._steps(owned_here, iter(self.exchange.gather(wanted)), lr)
            changed = [([rows for unit in units for rows in unit], owner) for units, owner in owned]
            for fragment, offset, step in self.exchange.give_back(changed, new):
                apply_step(fragment.master().narrow(0, offset, step.numel()), step, lr * self.config.weight_decay)

    def _steps(self, units: list[tuple[Rows, ...]], gathered: Iterator[Tensor], lr: float) -> list[Tensor]:
        """Steps of the matrices of `units`, of which `gathered` has the directions and, with spectron, the weights."""
        directions: list[Tensor] = []
        weights: list[Tensor] = []
        for unit in units:
            directions += [next(gathered) for _ in unit]
            weights += [next(gathered) for _ in unit if self.spectron]
        divisors: list[float | Tensor] = [1.0] * len(directions)
        if self.spectron:
            norms, at = spectral_norms(weights), 0
            for unit in units:
                if len(unit) == 2:  # a pair; a matrix alone is moved as without spectron
                    divisors[at : at + 2] = [1 + norms[at] + norms[at + 1]] * 2
                at += len(unit)
        steps, width = self.config.muon_steps, self.hidden_size
        return matrix_steps(directions, lr=lr, steps=steps, hidden_size=width, divisors=divisors)

    def _flat(self, rows: Rows) -> Tensor:
        """The fp32 tensor of the optimizer that the matrix's parameter lies in."""
        return self.exchange.homes[rows.parameter].flat
