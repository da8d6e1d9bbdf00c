"""A run's folder: one run at a time writes in it, and a finished one is not begun again."""

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from elas.checkpoint.folder import Checkpoint
from elas.config import Config
from elas.errors import ConfigError
from elas.train.metrics import read_jsonl
from elas.train.result import RunResult


def claim(config: Config) -> BaseFileLock | None:
    """Make the folder and lock it for this process; the system lets go when the process ends, however it ends.

    Raises:
        ConfigError: another run holds it, or it cannot be made.
    """
    folder, key = Path(config.train.run_dir), "train.run_dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        fix = "wait for it to end, end it, or give another folder"
        raise ConfigError(key, config.train.run_dir, "another run is writing there", fix) from None
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
        raise ConfigError(key, config.train.run_dir, why, "give another folder") from None
    return lock


def finished(config: Config, checkpoint: Checkpoint | None) -> RunResult | None:
    """The result of a run whose last checkpoint and validation are there; None when something is left to do."""
    if checkpoint is None or checkpoint.step != config.train.steps:
        return None
    folder = Path(config.train.run_dir)
    if checkpoint.path.resolve().parent != (folder / "checkpoints").resolve():
        return None  # another run's: this one has yet to write its own files
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
