"""What follows an optimizer's element-wise step where the optimizer treats matrices as such."""

from elas.engine.engine import Engine
from elas.engine.loro_cycle import LoroCycle
from elas.engine.muon_cycle import MuonCycle


def cycle_of(engine: Engine) -> LoroCycle | MuonCycle | None:
    """The cycle of an engine's optimizer: call `begin` before and `end` after each of its steps; None for AdamW."""
    config = engine.config.optimizer
    kind = {"loro": LoroCycle, "muon": MuonCycle}.get(config.kind)
    return kind(engine, config) if kind else None
