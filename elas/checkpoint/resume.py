"""Loads a checkpoint into any layout after checking every byte of it; every rank takes part."""

from elas.checkpoint.choose import newest_checkpoint
from elas.checkpoint.collective import damage, load_on_all_ranks
from elas.checkpoint.folder import Checkpoint
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
        problems = damage(found)
        if not problems:
            return found
        if config.checkpoint.resume != "auto":
            fix = "give the folder of an intact checkpoint"
            raise ConfigError("checkpoint.resume", str(found.path), ", ".join(problems), fix)
        damaged = (*found.passed_over, f"{found.path}: {', '.join(problems)}")
        older = newest_checkpoint(config, damaged)
        assert older is not None  # with damaged ones, it returns an intact one or raises
        found = older


def restore(engine, checkpoint: Checkpoint) -> None:
    """Load an intact checkpoint into the engine; every rank must call it.

    Raises:
        ConfigError: it does not fit the model; raised on every rank.
    """
    from elas.checkpoint import state, storage
    from elas.checkpoint.weights import model_weights

    def load() -> None:
        held = state.targets(engine)
        if checkpoint.is_start:  # a rollback may come back to it, so moments are set, not just left as they are
            state.zero_moments(held)
            held = state.master_weights(engine)
        storage.read(checkpoint.path, {**held})
        storage.read(checkpoint.path, model_weights(engine.chunks, engine.layout))
        if state.layout_facts(engine) == checkpoint.manifest["layout"]:
            streams = {state.random_name(): state.capture_random()}
            storage.read(checkpoint.path, streams)
            state.restore_random(*streams.values())

    load_on_all_ranks(load, checkpoint, "checkpoint.resume")
    state.finish_loading(engine, checkpoint.manifest["optimizer_step"])
