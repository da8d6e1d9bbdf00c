"""What happens beside the steps happens when it is said to, and counts in the time that is left."""

import pytest

from elas.config import load_config
from elas.config.phases import unreached
from elas.train import events


def config_of(**settings):
    given = {"train.steps": 20, "train.eval_every": 5, "train.eval_batches": 1, "checkpoint.every_steps": 8}
    return load_config(None, given | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.mark.parametrize("first, expected", [(1, [1, 7, 14, 20]), (8, [8, 14, 20]), (14, [14, 20]), (20, [20])])
def test_a_start_logs_its_first_step_multiples_and_the_last(first, expected):
    config = config_of(log__every_steps=7)
    assert [step for step in range(first, 21) if events.logs(config, step, first)] == expected


@pytest.mark.parametrize("every, start", [(20, 0), (20, 17), (30, 0), (7, 14), (7, 12)])
def test_the_warning_of_missing_lines_agrees_with_the_lines(every, start):
    """It is said where no line lies between this start's first step and the last, though there are steps."""
    config = config_of(log__every_steps=every)
    between = [step for step in range(start + 2, 20) if events.logs(config, step, start + 1)]
    said = any(line.startswith("log.every_steps") for line in unreached(config, start))
    assert said == (not between and start + 2 < 20)


@pytest.mark.parametrize("settings", [{}, {"train__eval_every": 0}, {"train__eval_batches": 0},
                                      {"checkpoint__every_steps": 0}, {"checkpoint__every_steps": 20}])  # fmt: skip
def test_the_time_left_holds_what_is_still_due(settings):
    """Against a count of the events themselves, step by step."""
    config = config_of(**settings)
    due = events.Due(config.train, config.checkpoint)
    assert due.seconds(0, over=True) == 0.0  # what was never measured counts for nothing
    due.validation_s, due.save_s = 100.0, 1000.0
    for step in range(1, 21):
        for over in (True, False):
            rest = range(step + over, 21)
            expected = sum(100 * events.validates(config, s) + 1000 * events.saves(config, s) for s in rest)
            assert due.seconds(step, over=over) == expected, (step, over)
