"""Loading a checkpoint into any layout, once every byte of it was read; every rank takes part."""

import pickle
from collections.abc import Callable

import torch.distributed as dist

from elas.checkpoint.choose import newest_checkpoint
from elas.checkpoint.folder import Checkpoint, damaged_files
from elas.config import Config
from elas.errors import ConfigError


def first_intact(found: Checkpoint, config: Config) -> Checkpoint:
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
        found = newest_checkpoint(config, (*found.passed_over, f"{found.path}: {', '.join(problems)}"))


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
