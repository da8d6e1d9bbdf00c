"""Result of a run."""

import math
from dataclasses import dataclass
from pathlib import Path

from elas.checkpoint.folder import Checkpoint
from elas.config import Config
from elas.console import clock
from elas.files import read_jsonl


@dataclass(frozen=True)
class RunResult:
    """Result of a run; the same on every rank."""

    step: int
    tokens: int
    loss: float | None
    """Training loss of the last step."""
    valid_loss: float | None
    """Mean loss on the validation batches at the end; None without validation."""
    checkpoint: str | None
    """Folder of the last checkpoint."""
    stopped: str = ""
    """Why it stopped before train.steps; empty if it completed."""

    def done_line(self, seconds: float) -> str:
        """The last line of a completed run, `seconds` after this start."""
        parts = [f"step {self.step}", f"{self.tokens:,} tokens"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.valid_loss is not None:
            parts.append(f"validation perplexity {math.exp(min(self.valid_loss, 80.0)):,.1f}")
        return f"done: {', '.join(parts)}; {self.checkpoint}; {clock(seconds)} since this start"


def finished(config: Config, checkpoint: Checkpoint | None) -> RunResult | None:
    """The result of a complete run, read from its files; None if training or the last validation is still to do."""
    if checkpoint is None or checkpoint.step != config.train.steps:
        return None
    folder = Path(config.train.run_dir)
    if checkpoint.path.resolve().parent != (folder / "checkpoints").resolve():
        return None  # a checkpoint of another run; this run has not written its own files yet
    losses = [row["loss"] for row in read_jsonl(folder / "validation.jsonl") if row["step"] == checkpoint.step]
    if config.train.eval_batches and not losses:
        return None
    training = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if row["step"] == checkpoint.step]
    return RunResult(
        step=checkpoint.step,
        tokens=checkpoint.manifest["tokens"],
        loss=training[-1] if training else None,
        valid_loss=losses[-1] if losses else None,
        checkpoint=str(checkpoint.path),
    )
