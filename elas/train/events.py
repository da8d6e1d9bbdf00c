"""When metrics are logged, validations run and checkpoints are saved; and how long the remaining ones take."""

from elas.config import CheckpointConfig, Config, TrainConfig


def logs(config: Config, step: int, first: int) -> bool:
    """Whether a step is logged: multiples of `log.every_steps`, the first step of this start, and the last step."""
    return step % config.log.every_steps == 0 or step in (first, config.train.steps)


def validates(config: Config, step: int) -> bool:
    """Whether a validation follows a step."""
    every = config.train.eval_every
    return bool(config.train.eval_batches) and (step == config.train.steps or bool(every and step % every == 0))


def saves(config: Config, step: int) -> bool:
    """Whether a save follows a step."""
    every = config.checkpoint.every_steps
    return step == config.train.steps or bool(every and step % every == 0)


def measures_pairs(config: Config, step: int) -> bool:
    """Whether factor pairs are measured at a step: multiples of `log.pairs_every_steps`, and the last step."""
    every = config.log.pairs_every_steps
    return config.low_rank.kind != "none" and bool(every) and (step % every == 0 or step == config.train.steps)


class Due:
    """Estimates the time of the remaining validations and saves.

    Attributes:
        validation_s: seconds of the last validation; 0 before the first.
        save_s: seconds that the last save blocked training; 0 before the first.
    """

    def __init__(self, train: TrainConfig, checkpoint: CheckpointConfig):
        self._train, self._every = train, checkpoint.every_steps
        self.validation_s = self.save_s = 0.0

    def seconds(self, step: int, *, over: bool) -> float:
        """Seconds of the validations and saves after `step`; `over`: those due at `step` itself are done."""
        train, before = self._train, step if over else step - 1
        validations = _due(train.eval_every, before, train.steps) if train.eval_batches else 0
        saves = _due(self._every, before, train.steps)
        return validations * self.validation_s + saves * self.save_s


def _due(every: int, before: int, last: int) -> int:
    """Number of multiples of `every` in the steps before + 1 to last; the last step always counts."""
    if before >= last:
        return 0
    multiples = last // every - before // every if every else 0
    return multiples + (0 if every and last % every == 0 else 1)
