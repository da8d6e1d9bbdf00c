"""A run's folder: its lock, its checkpoints folder, and the markers of how the run ended.

`launch/slurm/pretrain.sbatch` also uses the names `DONE` and `REQUEUE`. Does not import torch.
"""

import contextlib
import os
import time
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from elas.config import Config
from elas.errors import ConfigError
from elas.files import write_json

DONE, REQUEUE = "DONE", "REQUEUE"
LOCK = ".lock"


def checkpoints_dir(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.train.run_dir) / "checkpoints"


def claim(config: Config) -> BaseFileLock:
    """Create the run's folder and lock it; the system releases the lock when this process ends for any reason.

    Raises:
        ConfigError: another run holds the lock, or the folder cannot be created or written to.
    """
    folder, key = Path(config.train.run_dir), "train.run_dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        fix = "wait for it to end, end it, or give another folder"
        raise ConfigError(key, config.train.run_dir, "another run is writing there", fix) from None
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
        raise ConfigError(key, config.train.run_dir, why, "give another folder") from None
    return lock


def lock_holder(folder: Path) -> int | None:
    """The process on this host that holds a run's lock; None if none is seen, as for a run on another host.

    It only looks: taking the lock for a moment could refuse a run that starts just then.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        facts = os.stat(folder / LOCK)
        name = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():  # 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE …
            fields = line.split()
            if name in fields and fields[1] == "FLOCK" and int(fields[4]) > 0:
                return int(fields[4])
    return None


def clear_markers(run_dir: str) -> None:
    """Remove the markers of the previous start; call it on rank 0 only."""
    for name in (DONE, REQUEUE):
        (Path(run_dir) / name).unlink(missing_ok=True)


def write_marker(run_dir: str, facts: dict, stopped: str) -> None:
    """Write `DONE`, or `REQUEUE` if the run stopped early; call it on rank 0 only.

    Args:
        run_dir: the run's folder.
        facts: `step`, `checkpoint` and further facts.
        stopped: why it stopped early; empty if it completed.
    """
    name = REQUEUE if stopped else DONE
    facts = {**facts, "time": time.time()}  # so that no two markers are equal
    write_json(Path(run_dir) / name, facts | ({"stopped": stopped} if stopped else {}))
