"""Which checkpoint a run goes on from, and its loading: into any layout, from the newest one that is whole."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from elas.checkpoint.folder import Checkpoint, checkpoints_in, damaged_files, no_checkpoint, read_checkpoint
from elas.checkpoint.identity import check_same_run, identity, typed
from elas.config import Config
from elas.errors import ConfigError
from elas.train.metrics import read_jsonl


def checkpoints_dir(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.train.run_dir) / "checkpoints"


def find_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` asks for, by manifests and sizes; needs no process group.

    Returns:
        None to start afresh.

    Raises:
        ConfigError: a named checkpoint is not whole, the model differs, the run is past `train.steps`, or a fresh
            start would overwrite a run.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        metrics = Path(config.train.run_dir) / "metrics.jsonl"
        if metrics.exists():
            fix = "give another folder, move this one away, or set checkpoint.resume=auto to go on with it"
            raise ConfigError("train.run_dir", config.train.run_dir, "already holds a run", fix)
        return None
    if resume != "auto":
        found = no_checkpoint(Path(resume)) or read_checkpoint(Path(resume))
        if isinstance(found, str):
            fix = "give the folder of a whole checkpoint, RUN_DIR/checkpoints/step_…, or auto or none"
            raise ConfigError("checkpoint.resume", resume, found, fix)
        return _fitting(found, config)
    found = _newest(config, ())
    if found is None:
        _check_not_lost(config)
    return found


def _newest(config: Config, broken: tuple[str, ...]) -> Checkpoint | None:
    """The newest checkpoint of the run that looks whole; None where there is none at all.

    Args:
        config: of the run.
        broken: what is known to be wrong with the newest ones, a line for each.
    """
    passed_over = list(broken)
    for path in list(checkpoints_in(checkpoints_dir(config)))[len(broken) :]:
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return _fitting(replace(found, passed_over=tuple(passed_over)), config)
        passed_over.append(f"{path}: {found}")
    if passed_over:
        why = f"none of its checkpoints is whole ({'; '.join(passed_over)})"
        raise ConfigError("train.run_dir", config.train.run_dir, why, "mend one, move the folder away, or give another")
    return None


def _check_not_lost(config: Config) -> None:
    """Refuse to start over a run that had checkpoints; one killed before its first is simply begun again."""
    rows = read_jsonl(Path(config.train.run_dir) / "metrics.jsonl")
    every = config.checkpoint.every_steps
    last = rows[-1]["step"] if rows else 0
    if last and (last >= config.train.steps or (every and last > every)):
        why = f"its metrics go to step {last}, but its checkpoints are gone"
        fix = "put them back, name one as checkpoint.resume, move the folder away, or give another"
        raise ConfigError("train.run_dir", config.train.run_dir, why, fix)


def _fitting(found: Checkpoint, config: Config) -> Checkpoint:
    if found.manifest.get("weights_only"):
        key = "train.run_dir" if config.checkpoint.resume == "auto" else "checkpoint.resume"
        fix = f"give another train.run_dir, and checkpoint.init_from={found.path}"
        raise ConfigError(key, typed(config, key), f"{found.path} holds weights without moments", fix)
    check_same_run(config, identity(config), found)
    if found.step > config.train.steps:
        why = f"the run is at step {found.step} already ({found.path})"
        raise ConfigError("train.steps", config.train.steps, why, "give more steps, or start in another folder")
    return found


def first_whole(found: Checkpoint, config: Config) -> Checkpoint:
    """Read every byte of a checkpoint, the ranks sharing the work; every rank calls it.

    Returns:
        The checkpoint, or with `resume: auto` the newest before it that is whole.

    Raises:
        ConfigError: none is; the same on every rank.
    """
    while True:
        problems = together(damaged_files(found, share_out(found)))
        if not problems:
            return found
        if config.checkpoint.resume != "auto":
            fix = "give the folder of a whole checkpoint"
            raise ConfigError("checkpoint.resume", str(found.path), ", ".join(problems), fix)
        found = _newest(config, (*found.passed_over, f"{found.path}: {', '.join(problems)}"))


def restore(engine, checkpoint: Checkpoint) -> None:
    """Fill the engine from a checkpoint that is whole; every rank calls it.

    Raises:
        ConfigError: it is not this model's; the same on every rank.
    """
    from elas.checkpoint import state, storage

    def load() -> None:
        storage.read(checkpoint.path, state.targets(engine))
        storage.read(checkpoint.path, state.computed_with(engine))
        layout, then = state.layout_facts(engine), checkpoint.manifest["layout"]
        if layout == then:
            streams = {state.random_name(): state.capture_random()}
            storage.read(checkpoint.path, streams)
            state.restore_random(*streams.values())

    load_together(load, "checkpoint.resume", checkpoint)
    state.finish_loading(engine, checkpoint.manifest["optimizer_step"])


def share_out(checkpoint: Checkpoint) -> list[str]:
    """This rank's share of a checkpoint's files to be read; together the ranks read all."""
    return sorted(checkpoint.manifest["files"])[dist.get_rank() :: dist.get_world_size()]


def load_together(load: Callable[[], None], key: str, checkpoint: Checkpoint) -> None:
    """Call `load`; what goes wrong on one rank is a `ConfigError` of the setting `key` on all."""
    problems = []
    try:
        load()
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError, ValueError) as error:
        problems = [f"rank {dist.get_rank()}: {type(error).__name__}: {error}"]
    problems = together(problems)
    if problems:
        raise ConfigError(key, str(checkpoint.path), problems[0], "give another checkpoint")


def together(problems: list[str]) -> list[str]:
    """The problems of all ranks, on all ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    return [problem for of_rank in gathered for problem in of_rank]


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    import importlib.metadata

    from elas import __version__

    others = ("deepspeed", "megatron-core")
    return {"elas": __version__, "torch": torch.__version__} | {n: importlib.metadata.version(n) for n in others}
