"""How a run ended."""

import math
from dataclasses import dataclass

from elas.console import clock


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

    def done_line(self, seconds: float) -> str:
        """The last line of a run that came to its end, `seconds` after this start."""
        parts = [f"step {self.step}", f"{self.tokens:,} tokens"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.valid_loss is not None:
            parts.append(f"validation perplexity {math.exp(min(self.valid_loss, 80.0)):,.1f}")
        return f"done: {', '.join(parts)}; {self.checkpoint}; {clock(seconds)} since this start"
