"""What of a run is saved, and what would be lost if it ended now."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elas.checkpoint.folder import Checkpoint
from elas.config import Config
from elas.run_dir import checkpoints_dir


@dataclass(frozen=True)
class Standing:
    """What of a run is saved.

    Attributes:
        checkpoint: the newest complete checkpoint, possibly the one that the run resumed from; None without any.
        step: the step it holds.
        unsaved: whether anything was trained since.
    """

    checkpoint: Path | None
    step: int
    unsaved: bool

    @classmethod
    def at_start(cls, resume: Checkpoint | None = None) -> "Standing":
        """Before the first step of a start; `resume` is the checkpoint that it resumes from."""
        return cls(resume.path, resume.step, unsaved=False) if resume else cls(None, 0, unsaved=False)

    def plan(self) -> str:
        """What the run does when asked to stop."""
        return "the run will save and end" if self.unsaved else "the run will end"

    def lost(self) -> str:
        """What is lost if the run ends at once."""
        if self.checkpoint is None:
            return "all steps are lost, as none is saved yet" if self.unsaved else "nothing has been trained yet"
        if self.unsaved:
            return f"all steps after {self.step} are lost; {self.checkpoint} is kept"
        return f"nothing is lost: step {self.step} is saved in {self.checkpoint}"


class Ledger:
    """Answers what of a run is saved from its first moment on, to any thread.

    Args:
        resume: the checkpoint that the run resumes from.
    """

    def __init__(self, resume: Checkpoint | None):
        at_start = Standing.at_start(resume)
        self._ask: Callable[[], Standing] = lambda: at_start

    def follow(self, ask: Callable[[], Standing]) -> None:
        """Ask this from now on: signals are handled while the run that will know is still being built, for minutes."""
        self._ask = ask

    def standing(self) -> Standing:
        """What is saved now."""
        return self._ask()


def stopped_line(config: Config, step: int, why: str, checkpoint: Path | None) -> str:
    """The last line of a run that was asked to stop.

    Args:
        config: the run's.
        step: steps taken.
        why: the reason it stopped.
        checkpoint: the newest one; None without any.
    """
    if checkpoint is None:
        return f"stopped before step 1 was done ({why}), so nothing was saved; the same command starts it again"
    return f"stopped after step {step} ({why}), saved in {checkpoint}; {how_to_resume(config, checkpoint)}"


def how_to_resume(config: Config, checkpoint: Path) -> str:
    """How to resume from a run's newest checkpoint, as the end of a line."""
    if checkpoint.resolve().parent != checkpoints_dir(config).resolve():
        return "the same command starts from there again"  # another run's checkpoint, named as checkpoint.resume
    if config.checkpoint.resume != "auto":
        return "to resume from there, set checkpoint.resume=auto"
    return "the same command resumes from there"
