"""What a run has to show for itself when it is stopped: which checkpoint holds how much, and what would be lost."""

from dataclasses import dataclass
from pathlib import Path

from elas.config import Config
from elas.run_dir import checkpoints_dir


@dataclass(frozen=True)
class Standing:
    """How far a run is, and what of it is saved.

    Attributes:
        checkpoint: the newest one in place, also the one that the run resumed from; None without any.
        step: that it holds.
        unsaved: whether something was trained since.
    """

    checkpoint: Path | None
    step: int
    unsaved: bool

    def plan(self) -> str:
        """What a run that is asked to stop does."""
        return "the run will save and end" if self.unsaved else "the run will end"

    def lost(self) -> str:
        """What ending at once would lose."""
        if self.checkpoint is None:
            return "all steps are lost, as none is saved yet" if self.unsaved else "nothing has been trained yet"
        if self.unsaved:
            return f"what came after step {self.step} is lost; {self.checkpoint} stays"
        return f"nothing is lost: step {self.step} is saved in {self.checkpoint}"


def stopped_line(config: Config, step: int, why: str, checkpoint: Path | None) -> str:
    """The last line of a run that was asked to stop.

    Args:
        config: the run's.
        step: steps taken.
        why: it stopped.
        checkpoint: the newest one; None without any.
    """
    if checkpoint is None:
        return f"stopped before step 1 was done ({why}), so nothing was saved; the same command begins again"
    return f"stopped after step {step} ({why}), saved in {checkpoint}; {how_to_go_on(config, checkpoint)}"


def how_to_go_on(config: Config, checkpoint: Path) -> str:
    """What to start to go on from a run's newest checkpoint."""
    if checkpoint.resolve().parent != checkpoints_dir(config).resolve():
        return "the same command begins from there again"  # another run's, named as checkpoint.resume
    if config.checkpoint.resume != "auto":
        return "to go on from there, start it with checkpoint.resume=auto"
    return "the same command goes on from there"
