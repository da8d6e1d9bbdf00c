"""How a run ended."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    tokens: int
    loss: float | None
    """Training loss of the last step."""
    valid_loss: float | None
    """Mean loss on the validation batches at the end; None without validation."""
    checkpoint: str | None
    """Folder of the last checkpoint."""
    stopped: str = ""
    """Why it stopped before train.steps, empty at its end."""
