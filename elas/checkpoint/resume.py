"""Loads a checkpoint into any layout after checking every byte of it; every rank takes part."""

import pickle
from collections.abc import Callable

import torch.distributed as dist

from elas.checkpoint.choose import newest_checkpoint
from elas.checkpoint.folder import Checkpoint, damaged_files
from elas.config import Config
from elas.errors import ConfigError


def first_intact(found: Checkpoint, config: Config) -> Checkpoint:
    """Check every byte of a checkpoint, the ranks sharing the work; every rank must call it.

    Returns:
        The checkpoint; with `resume: auto`, if it is damaged, the newest intact one before it.

    Raises:
        ConfigError: none is intact; raised on every rank.
    """
    while True:
        problems = gather_problems(damaged_files(found, files_of_rank(found)))
        if not problems:
            return found
        if config.checkpoint.resume != "auto":
            fix = "give the folder of an intact checkpoint"
            raise ConfigError("checkpoint.resume", str(found.path), ", ".join(problems), fix)
        found = newest_checkpoint(config, (*found.passed_over, f"{found.path}: {', '.join(problems)}"))


def restore(engine, checkpoint: Checkpoint) -> None:
    """Load an intact checkpoint into the engine; every rank must call it.

    Raises:
        ConfigError: it does not fit the model; raised on every rank.
    """
    from elas.checkpoint import state, storage

    def load() -> None:
        storage.read(checkpoint.path, state.targets(engine))
        storage.read(checkpoint.path, state.model_weights(engine))
        if state.layout_facts(engine) == checkpoint.manifest["layout"]:
            streams = {state.random_name(): state.capture_random()}
            storage.read(checkpoint.path, streams)
            state.restore_random(*streams.values())

    load_on_all_ranks(load, "checkpoint.resume", checkpoint)
    state.finish_loading(engine, checkpoint.manifest["optimizer_step"])


def files_of_rank(checkpoint: Checkpoint) -> list[str]:
    """The files of a checkpoint that this rank checks; the ranks together cover all files."""
    return sorted(checkpoint.manifest["files"])[dist.get_rank() :: dist.get_world_size()]


def load_on_all_ranks(load: Callable[[], None], key: str, checkpoint: Checkpoint) -> None:
    """Call `load`; an error on any rank raises a `ConfigError` of the setting `key` on all ranks."""
    problems = []
    try:
        load()
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError, ValueError) as error:
        problems = [f"rank {dist.get_rank()}: {type(error).__name__}: {error}"]
    problems = gather_problems(problems)
    if problems:
        raise ConfigError(key, str(checkpoint.path), problems[0], "give another checkpoint")


def gather_problems(problems: list[str]) -> list[str]:
    """The problems of all ranks, returned on all ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    return [problem for of_rank in gathered for problem in of_rank]
