"""What happens beside the steps, and when: metrics, validations, saves; and the time that all of it takes."""

from elas.config import Config


def logs(config: Config, step: int, first: int) -> bool:
    """Whether a step has a line of metrics: multiples of `log.every_steps`, this start's first step, and the last."""
    return step % config.log.every_steps == 0 or step in (first, config.train.steps)


def validates(config: Config, step: int) -> bool:
    """Whether a validation follows a step."""
    every = config.train.eval_every
    return bool(config.train.eval_batches) and (step == config.train.steps or bool(every and step % every == 0))


def saves(config: Config, step: int) -> bool:
    """Whether a save follows a step."""
    every = config.checkpoint.every_steps
    return step == config.train.steps or bool(every and step % every == 0)


class Due:
    """The validations and saves that are still to come, in seconds.

    Args:
        config: the run's.

    Attributes:
        validation_s, save_s: what the last one took, or kept training waiting; 0 until there was one.
    """

    def __init__(self, config: Config):
        self._config = config
        self.validation_s = self.save_s = 0.0

    def seconds(self, step: int, *, over: bool) -> float:
        """What they take after a step; `over`: the validation and the save that follow this step are done."""
        train, before = self._config.train, step if over else step - 1
        validations = _due(train.eval_every, before, train.steps) if train.eval_batches else 0
        saves = _due(self._config.checkpoint.every_steps, before, train.steps)
        return validations * self.validation_s + saves * self.save_s


def _due(every: int, before: int, last: int) -> int:
    """Multiples of `every` in steps before + 1 to last, and the last step itself."""
    if before >= last:
        return 0
    multiples = last // every - before // every if every else 0
    return multiples + (0 if every and last % every == 0 else 1)
