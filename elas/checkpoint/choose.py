"""Selects checkpoints, by manifests and file sizes: what a run resumes from, or what a path holds.

Needs no process group.
"""

from pathlib import Path

from elas.checkpoint.folder import (
    MANIFEST,
    Checkpoint,
    checkpoints_in,
    newest_intact,
    no_checkpoint,
    read_checkpoint,
    unusable,
)
from elas.checkpoint.identity import check_same_run, identity, typed
from elas.config import Config
from elas.errors import ConfigError
from elas.files import read_jsonl
from elas.run_dir import checkpoints_dir, in_use, lock_holder, marked_checkpoint


def find_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` selects.

    Returns:
        The checkpoint; None to start a new run.

    Raises:
        ConfigError: a named checkpoint is not intact, the model differs, the run is past `train.steps`, or a new run
            would overwrite an existing one.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        metrics = Path(config.train.run_dir) / "metrics.jsonl"
        if metrics.exists():
            fix = "give another folder, move this one away, or set checkpoint.resume=auto to resume it"
            raise ConfigError("train.run_dir", config.train.run_dir, "already holds a run", fix)
        return None
    if resume != "auto":
        found = no_checkpoint(Path(resume)) or read_checkpoint(Path(resume))
        if isinstance(found, str):
            fix = "give the folder of an intact checkpoint, RUN_DIR/checkpoints/step_…, or auto or none"
            raise ConfigError("checkpoint.resume", resume, found, fix)
        return _check_compatible(found, config)
    found = newest_checkpoint(config, ())
    if found is None:
        _check_not_lost(config)
    return found


def newest_checkpoint(config: Config, broken: tuple[str, ...]) -> Checkpoint | None:
    """The run's newest checkpoint that is intact by manifest and sizes; None if the run has no checkpoint at all.

    Args:
        config: the run's configuration.
        broken: one line for each of the newest checkpoints that are already known to be damaged; these are skipped.

    Raises:
        ConfigError: none of the run's checkpoints is intact, or the newest does not fit the configuration.
    """
    folders = list(checkpoints_in(checkpoints_dir(config)))[len(broken) :]
    found = newest_intact(folders, broken)
    if isinstance(found, Checkpoint):
        return _check_compatible(found, config)
    if found:
        fix = "restore one, move the folder away, or give another"
        raise ConfigError("train.run_dir", config.train.run_dir, found, fix)
    return None


def find(path: Path | str, key: str | None = None) -> Checkpoint:
    """The checkpoint at a path that a user gave: a checkpoint's folder, or a run's, whose newest intact one it is.

    It is intact by its manifest and file sizes; `elas.checkpoint.folder.require_intact` checks every byte.
    `passed_over` names newer ones that were skipped.

    Args:
        path: the folder, as given.
        key: the setting that names it, for messages.

    Raises:
        UserError: there is none (as a `ConfigError` of `key`, if given).
    """
    folder = Path(path)
    inside = folder / "checkpoints"
    if inside.is_dir():
        found = newest_intact(checkpoints_in(inside)) or "has no checkpoint"
    else:
        found = no_checkpoint(folder) or read_checkpoint(folder)
    if isinstance(found, str):
        raise unusable(path, found, "give a run's folder, or the folder of an intact checkpoint in it", key)
    return found


def is_other_model(path: Path) -> bool:
    """Whether a folder may hold a model of Hugging Face, and no checkpoint of ours."""
    ours = (path / MANIFEST).exists() or (path / "checkpoints").is_dir()
    return not ours and ((path / "config.json").is_file() or any(path.glob("*.safetensors")))


def check_model(path: Path) -> None:
    """Raise `UserError` unless a path holds a model, ours or of Hugging Face, by names, manifests and sizes alone.

    For commands that import torch afterwards, which takes seconds.
    """
    if not is_other_model(path):
        find(path)


def _check_not_lost(config: Config) -> None:
    """Raise `ConfigError` if a run must have had checkpoints; one killed before its first simply starts again."""
    folder = Path(config.train.run_dir)
    rows = read_jsonl(folder / "metrics.jsonl")
    every = config.checkpoint.every_steps
    last = rows[-1]["step"] if rows else 0
    if last and (marked_checkpoint(folder) or last >= config.train.steps or (every and last > every)):
        if lock_holder(folder) is not None:  # it may be about to save its first
            raise in_use(config)
        why = f"its metrics go to step {last}, but its checkpoints are gone"
        fix = "restore them, name one as checkpoint.resume, move the folder away, or give another"
        raise ConfigError("train.run_dir", config.train.run_dir, why, fix)


def _check_compatible(found: Checkpoint, config: Config) -> Checkpoint:
    if found.manifest.get("weights_only") and not found.is_start:
        key = "train.run_dir" if config.checkpoint.resume == "auto" else "checkpoint.resume"
        fix = f"give another train.run_dir, and checkpoint.init_from={found.path}"
        raise ConfigError(key, typed(config, key), f"{found.path} holds weights without moments", fix)
    check_same_run(config, identity(config), found)
    if found.step > config.train.steps:
        why = f"the run is already at step {found.step} ({found.path})"
        raise ConfigError("train.steps", config.train.steps, why, "give more steps, or start in another folder")
    return found
