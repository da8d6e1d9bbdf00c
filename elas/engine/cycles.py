"""What follows an optimizer's element-wise step where the optimizer treats matrices as such."""

from elas.engine.engine import Engine
from elas.engine.loro_cycle import LoroCycle
from elas.engine.muon_cycle import MuonCycle


def cycle_of(engine: Engine) -> LoroCycle | MuonCycle | None:
    """The cycle of an engine's optimizer: call `begin` before and `end` after each of its steps; None for AdamW."""
    if engine.config.optimizer.kind == "loro":
        return LoroCycle(engine, engine.config.optimizer)
    return engine.muon
