"""Warnings for phases that a run is too short to reach: 2:4 that never starts, a warm-up longer than the run, …

These are not errors, since settings are often tried in short runs, but such a run must not be mistaken for a full one.
"""

import math
from collections.abc import Iterator

from elas.config.schema import Config, LogConfig

SPIKE_WINDOW = 20
"""Minimum number of earlier losses to detect a spike; the same value as in `elas.train`."""


def unreached(config: Config, start: int = 0) -> list[str]:
    """Phases that a run resumed after step `start` will not reach.

    Args:
        config: validated.
        start: step of the checkpoint that the run resumes from; 0 for a new run.

    Returns:
        A line for each phase, `key=value: why; fix`; empty for a run with no steps left.
    """
    if start >= config.train.steps:
        return []
    found = (*_sparsity(config), *_learning_rate(config), *_loro(config, start), *_events(config, start),
             *_spikes(config, start), *_pairs(config), *_normalize(config))  # fmt: skip
    return [f"{key}={_value(config, key)!r}: {why}; {fix}" for key, why, fix in found]


Line = tuple[str, str, str]


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def can_be_sparse(config: Config) -> bool:
    """Whether the model has an activation that 2:4 prunes."""
    between = config.low_rank.kind == "cola" and config.low_rank.activation == "relu2"
    return config.sparsity.kind == "2:4" and (config.model.activation == "relu2" or between)


def _sparsity(config: Config) -> Iterator[Line]:
    steps = config.train.steps
    if can_be_sparse(config) and config.sparsity.dense_steps >= steps:
        why = f"2:4 sparsity never starts, the run ends at train.steps={steps}"
        yield "sparsity.dense_steps", why, _fewer(steps, share=True)


def _learning_rate(config: Config) -> Iterator[Line]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps > steps:
        share = steps / schedule.warmup_steps
        why = (
            f"the warm-up is longer than the run, so the rate ends at {share:.0%} of optimizer.lr (train.steps={steps})"
        )
        yield "schedule.warmup_steps", why, _fewer(steps, share=True)
    elif schedule.warmup_steps == steps and schedule.kind != "constant":
        why = f"the run ends with the warm-up, so the rate never decays (train.steps={steps})"
        yield "schedule.warmup_steps", why, _fewer(steps, share=True)
    elif schedule.kind == "wsd" and schedule.warmup_steps:
        decay = schedule.decay_steps if schedule.decay_steps is not None else max(1, steps // 10)
        if decay > steps - schedule.warmup_steps:
            left = steps - schedule.warmup_steps
            why = (
                f"starts within the warm-up of {schedule.warmup_steps} steps: no stable phase, and the rate jumps down"
            )
            yield "schedule.decay_steps", why, f"give {left} or less"


def _loro(config: Config, start: int) -> Iterator[Line]:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.kind != "loro" or optimizer.exact_every is None:
        return
    what = {"with_exact": "exact step and no refresh", "only": "refresh", "none": "exact step"}[optimizer.refresh]
    if not _due(optimizer.exact_every, start, steps):
        where = _between(start, steps) if start else f"in {steps} steps"
        yield "optimizer.exact_every", f"no {what} {where}", _fewer(steps, start)
    elif not _due(optimizer.exact_every, start, steps - 1):
        yield (
            "optimizer.exact_every",
            f"no {what} {_between(start, steps)}, so no training follows one",
            _fewer(steps, start),
        )


def _events(config: Config, start: int) -> Iterator[Line]:
    """Validations, saves and log lines between the first and the last step, which always have them."""
    train, checkpoint, steps = config.train, config.checkpoint, config.train.steps
    if train.eval_batches and train.eval_every and not _due(train.eval_every, start, steps - 1) and steps > start + 1:
        where = _between(start, steps) if start else f"between the start and the last step, {steps}"
        yield "train.eval_every", f"no validation {where}", _fewer(steps, start)
    every = checkpoint.every_steps
    if every and not _due(every, start, steps - 1) and steps > start + 1:
        yield "checkpoint.every_steps", f"no checkpoint {_between(start, steps)}", _fewer(steps, start)
    if checkpoint.keep and checkpoint.keep_every:
        saved = math.lcm(every, checkpoint.keep_every) if every else 0
        if steps % checkpoint.keep_every and not (saved and _due(saved, start, steps)):
            why = f"no step that saves is a multiple of it, so no checkpoint is kept permanently (up to step {steps})"
            fix = f"give a multiple of checkpoint.every_steps={every} that the run reaches, or 0"
            yield "checkpoint.keep_every", why, fix
    if not _due(config.log.every_steps, start, steps - 1) and steps > start + 2:
        yield "log.every_steps", f"no metrics between the first step and the last, {steps}", _fewer(steps, start)


def _spikes(config: Config, start: int) -> Iterator[Line]:
    train, every = config.train, config.checkpoint.every_steps
    if train.on_spike == "ignore":
        return
    if train.steps - start <= SPIKE_WINDOW:
        why = f"detecting a spike requires {SPIKE_WINDOW} earlier losses, but only {train.steps - start} steps are left"
        yield "train.on_spike", why, f"give train.steps more than {start + SPIKE_WINDOW}, or ignore"
    elif train.on_spike == "rollback" and not start and not (every and _due(every, start, train.steps - 1)):
        why = "there is no checkpoint to roll back to before the last step, so a spike ends the run"
        yield "train.on_spike", why, f"give checkpoint.every_steps less than {train.steps}"


def _pairs(config: Config) -> Iterator[Line]:
    if config.low_rank.kind == "none" and config.log.pairs_every_steps not in (0, LogConfig.pairs_every_steps):
        yield "log.pairs_every_steps", "a full-rank model has no factor pairs to measure", "leave it out"


def _normalize(config: Config) -> Iterator[Line]:
    if config.low_rank.kind == "none" and config.optimizer.normalize == "spectron":
        why = "a full-rank model has no factor pairs, so the steps are plain Muon's"
        yield "optimizer.normalize", why, "set it to none, and optimizer.lr to a rate of plain Muon's, such as 0.006"
    elif config.optimizer.normalize == "spectron" and config.optimizer.lr_other is None:
        why = "embedding, output layer and norms take optimizer.lr, and AdamW's rates are far below those of Spectron"
        yield "optimizer.lr_other", why, "give it, such as 0.003"


def _due(every: int, start: int, last: int) -> bool:
    """Whether there is a multiple of `every` in steps start + 1 to last."""
    return last // every > start // every


def _between(start: int, steps: int) -> str:
    return (
        f"between step {start}, where it resumes, and the last, {steps}" if start else f"before the last step, {steps}"
    )


def _fewer(steps: int, start: int = 0, *, share: bool = False) -> str:
    """The fix for a number of steps that must be below `steps`; `share` for keys that may also be a share.

    With `start`, a multiple of it must lie between both, as one of every number up to their distance does.
    """
    if start:
        left = steps - start - 1
        return f"give {left} or less, or more train.steps" if left > 0 else "give more train.steps"
    if share:
        low = f"give less than {steps}" if steps > 1 else "give 0"
        return f"{low}, or a share such as 0.1, or more train.steps"
    return f"give less than {steps}, or more train.steps" if steps > 1 else "give more train.steps"
