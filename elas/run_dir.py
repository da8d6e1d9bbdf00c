"""A run's folder: who may write in it, where its checkpoints are, and the markers that say how the run ended.

`DONE` and `REQUEUE` are spelled here and in `launch/slurm/pretrain.sbatch` alone. Imports no torch.
"""

import time
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from elas.config import Config
from elas.errors import ConfigError
from elas.files import write_json

DONE, REQUEUE = "DONE", "REQUEUE"


def checkpoints_dir(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.train.run_dir) / "checkpoints"


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


def clear_markers(config: Config) -> None:
    """Remove the markers of the run before; on rank 0."""
    for name in (DONE, REQUEUE):
        (Path(config.train.run_dir) / name).unlink(missing_ok=True)


def write_marker(config: Config, facts: dict, stopped: str) -> None:
    """Say how the run ended; on rank 0.

    Args:
        config: the run's.
        facts: `step`, `checkpoint` and what else is worth knowing.
        stopped: why it stopped before its end; empty at the end.
    """
    name = REQUEUE if stopped else DONE
    facts = {**facts, "time": time.time()}  # no two endings leave the same marker
    write_json(Path(config.train.run_dir) / name, facts | ({"stopped": stopped} if stopped else {}))
