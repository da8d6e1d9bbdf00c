"""Starting a new run from another's weights: `checkpoint.init_from`, for other data, another schedule or optimizer.

Weights alone come from there. Moments, step, schedule and the order of samples begin afresh, and so does everything on
any layout. Once the run has a checkpoint of its own it goes on from that.
"""

from dataclasses import dataclass
from pathlib import Path

from elas.checkpoint.folder import Checkpoint, checkpoints_in, damaged_files, no_checkpoint, read_checkpoint
from elas.checkpoint.identity import SHAPE, effective, typed, written_config
from elas.checkpoint.resume import load_together, share_out, together
from elas.config import Config
from elas.errors import ConfigError

KEY = "checkpoint.init_from"


@dataclass(frozen=True)
class Initial:
    """Where the weights of a new run come from."""

    checkpoint: Checkpoint
    differs: tuple[str, ...]
    """Settings of the model's function, not of its shape, that are others than there; a line each."""

    def facts(self, config: Config) -> dict:
        """What the run's manifests keep of it."""
        given = str(Path(config.checkpoint.init_from).resolve())
        return {"given": given, "checkpoint": str(self.checkpoint.path.resolve()), "step": self.checkpoint.step}

    def says(self) -> list[str]:
        """Lines for the console: which checkpoint it is, what was passed over for it, and what differs."""
        path, step = self.checkpoint.path, self.checkpoint.step
        passed_over = [f"passed over {what}" for what in self.checkpoint.passed_over]
        return [*passed_over, f"begins with the weights of {path} (step {step}); all else afresh", *self.differs]


def find_initial(config: Config, resume: Checkpoint | None) -> Initial | None:
    """The checkpoint that `checkpoint.init_from` means, by manifests and sizes; needs no process group.

    Args:
        config: the run's.
        resume: what it goes on from, from `find_checkpoint`.

    Returns:
        None without `init_from`, and where the run goes on from a checkpoint of its own.

    Raises:
        ConfigError: no intact checkpoint there, a model of another shape, or a run that did not begin from it.
    """
    given = config.checkpoint.init_from
    if given is None:
        return None
    if resume is not None:
        _check_origin(config, resume)
        return None
    found = _checkpoint_in(Path(given))
    if isinstance(found, str):
        raise ConfigError(KEY, given, found, "give a run's folder, or that of an intact checkpoint in it")
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
        f"{key}={typed(config, key)!r}, and the weights were trained with {typed(written, key)!r}"
        for key in function
        if there.get(key, here[key]) != here[key]
    ]
    return Initial(found, tuple(differs))


def _checkpoint_in(folder: Path) -> Checkpoint | str:
    """A checkpoint's folder, or the newest intact one of a run's; a text says what is wrong."""
    inside = folder / "checkpoints"
    if not inside.is_dir():
        return no_checkpoint(folder) or read_checkpoint(folder)
    passed_over = []
    for path in checkpoints_in(inside):
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return Checkpoint(found.path, found.manifest, tuple(passed_over))
        passed_over.append(f"{path}: {found}")
    return f"none of its checkpoints is intact ({'; '.join(passed_over)})" if passed_over else "has no checkpoint"


def _check_origin(config: Config, resume: Checkpoint) -> None:
    """Refuse to leave `init_from` out silently: the run goes on, and must have begun from it."""
    given = config.checkpoint.init_from
    if config.checkpoint.resume != "auto":
        fix = "give one of the two"
        raise ConfigError(KEY, given, f"not with checkpoint.resume={config.checkpoint.resume}", fix)
    began = resume.manifest.get("init_from")
    if began is None or began["given"] != str(Path(given).resolve()):
        why = f"train.run_dir={config.train.run_dir} holds a run that began " + (
            "without it" if began is None else f"from {began['given']}"
        )
        raise ConfigError(KEY, given, why, "give another train.run_dir, or leave it out to go on with that run")


def load_weights(engine, initial: Initial) -> None:
    """Fill the engine's weights, fp32 and computed with, and nothing else; every rank calls it.

    Raises:
        ConfigError: a file is damaged, or the weights are not this model's; the same on every rank.
    """
    from elas.checkpoint import state, storage
    from elas.engine.zero import publish

    checkpoint = initial.checkpoint
    problems = together(damaged_files(checkpoint, share_out(checkpoint)))
    if problems:
        raise ConfigError(KEY, str(checkpoint.path), ", ".join(problems), "give another checkpoint")

    def load() -> None:
        storage.read(checkpoint.path, state.master_weights(engine))
        storage.read(checkpoint.path, state.computed_with(engine))

    load_together(load, KEY, checkpoint)
    publish(engine)
