"""`checkpoint.init_from`: starts a new run with another run's weights; data, schedule and optimizer may differ.

Only the weights are loaded, on any layout; moments, step, schedule and the order of samples start anew. Once the run
has a checkpoint of its own, it resumes from that.
"""

from dataclasses import dataclass
from pathlib import Path

from elas.checkpoint.choose import find
from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import SHAPE, effective, typed, written_config
from elas.config import Config
from elas.errors import ConfigError

KEY = "checkpoint.init_from"


@dataclass(frozen=True)
class Initial:
    """The checkpoint whose weights a new run starts with."""

    given: str
    """`checkpoint.init_from` as the user gave it."""
    checkpoint: Checkpoint
    differs: tuple[str, ...]
    """One line for each setting that differs and changes the model's function, but not its shapes."""

    def facts(self) -> dict:
        """The entry `init_from` of the run's manifests."""
        given = str(Path(self.given).resolve())
        return {"given": given, "checkpoint": str(self.checkpoint.path.resolve()), "step": self.checkpoint.step}

    def says(self) -> list[str]:
        """Lines for the console: skipped checkpoints, the one in use, and differing settings."""
        path, step = self.checkpoint.path, self.checkpoint.step
        skipped = [f"skipped {what}" for what in self.checkpoint.passed_over]
        return [*skipped, f"starting with the weights of {path} (step {step}); all other state is new", *self.differs]


def find_initial(config: Config, resume: Checkpoint | None) -> Initial | None:
    """The checkpoint that `checkpoint.init_from` selects, by manifests and sizes; needs no process group.

    Args:
        config: the run's configuration.
        resume: the checkpoint that the run resumes from, from `find_checkpoint`.

    Returns:
        The checkpoint; None without `init_from`, or if the run resumes from a checkpoint of its own.

    Raises:
        ConfigError: there is no intact checkpoint, its shapes differ, or the resumed run did not start from it.
    """
    given = config.checkpoint.init_from
    if given is None:
        return None
    if resume is not None:
        _check_origin(config, given, resume)
        return None
    found = find(given, KEY)
    written, there, here = written_config(found), effective(written_config(found)), effective(config)
    for key in SHAPE:
        if key in here and there.get(key) != here[key]:
            why = f"the weights of {KEY}={given} have {key}={typed(written, key)!r}"
            raise ConfigError(
                key, typed(config, key), why, f"set {key} to {there.get(key)}, or give another checkpoint"
            )
    function = [
        key for key in here if key.startswith(("model.", "low_rank.", "sparsity.")) and key != "model.seq_length"
    ]
    differs = [
        f"{key}={typed(config, key)!r}, but the weights were trained with {typed(written, key)!r}"
        for key in function
        if there.get(key, here[key]) != here[key]
    ]
    return Initial(given, found, tuple(differs))


def _check_origin(config: Config, given: str, resume: Checkpoint) -> None:
    """Raise `ConfigError` unless the resumed run started from `init_from`, which must not be ignored silently."""
    if config.checkpoint.resume != "auto":
        fix = "give one of the two"
        raise ConfigError(KEY, given, f"conflicts with checkpoint.resume={config.checkpoint.resume}", fix)
    began = resume.manifest.get("init_from")
    if began is None or began["given"] != str(Path(given).resolve()):
        why = f"train.run_dir={config.train.run_dir} holds a run that started " + (
            "without it" if began is None else f"from {began['given']}"
        )
        raise ConfigError(KEY, given, why, "give another train.run_dir, or leave it out to resume that run")


def load_initial(engine, initial: Initial) -> None:
    """Load only the engine's weights, the model's and the fp32 masters; every rank must call it.

    Raises:
        ConfigError: a file is damaged, or the weights do not fit the model; raised on every rank.
    """
    from elas.checkpoint import state, storage
    from elas.checkpoint.weights import load_weights
    from elas.engine.zero import publish

    path = initial.checkpoint.path
    load_weights(engine.chunks, engine.layout, initial.checkpoint, KEY)
    from elas.checkpoint.collective import load_on_all_ranks  # imports torch

    load_on_all_ranks(lambda: storage.read(path, state.master_weights(engine)), initial.checkpoint, KEY)
    publish(engine)
