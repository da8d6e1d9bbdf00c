"""A run's folder: its lock, its checkpoints folder, and the markers of how the run ended.

`launch/slurm/pretrain.sbatch` also uses the names `DONE` and `REQUEUE`. Does not import torch.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from elas.config import Config
from elas.errors import ConfigError, UserError
from elas.files import write_json

DONE, REQUEUE = "DONE", "REQUEUE"
LOCK = ".lock"
_OF_RUNS = ("config.json", "run.json", "metrics.jsonl", LOCK, DONE, REQUEUE)


def check_is_run(folder: Path) -> None:
    """Raise `UserError` for a path that is no run's folder, with the one that may be meant."""
    give = "give a run's folder (train.run_dir)"
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'does not exist'}; {give}")
    if any((folder / name).exists() for name in _OF_RUNS):
        return
    near = [*folder.absolute().parents[:2], *sorted(path.parent for path in folder.glob("*/metrics.jsonl"))]
    meant = next((path for path in near if (path / "metrics.jsonl").exists() or (path / "run.json").exists()), None)
    give = f"did you mean {meant}?" if meant else give
    raise UserError(f"{folder}: is not a run's folder, it has no config.json and no metrics.jsonl; {give}")


def checkpoints_dir(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.train.run_dir) / "checkpoints"


def claim(config: Config, *, starts: bool = False) -> BaseFileLock:
    """Create the run's folder and lock it; the system releases the lock when this process ends for any reason.

    Args:
        config: the run's.
        starts: training starts; the lock's file gets the current time, so that `elas watch` sees it on any host.

    Raises:
        ConfigError: another run holds the lock, or the folder cannot be created or written to.
    """
    folder, key = Path(config.train.run_dir), "train.run_dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
        if starts:
            os.utime(folder / LOCK)
    except Timeout:
        raise in_use(config) from None
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
        raise ConfigError(key, config.train.run_dir, why, "give another folder") from None
    return lock


def in_use(config: Config) -> ConfigError:
    """What is said of a folder whose lock another run holds."""
    fix = "wait for it to end, end it, or give another folder"
    return ConfigError("train.run_dir", config.train.run_dir, "another run is writing there", fix)


def withdraw(config: Config, lock: BaseFileLock) -> None:
    """Release the lock, and remove the folder that `claim` created, unless something else is in it by now."""
    folder = Path(config.train.run_dir)
    lock.release()
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()


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


def marked_checkpoint(folder: Path) -> str | None:
    """The checkpoint that the marker of a run's end names; None if there is no marker, or it names none."""
    for name in (DONE, REQUEUE):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((folder / name).read_text()).get("checkpoint")
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
