"""Learning rates at their corners."""

import pytest

from elas.config import OptimizerConfig, ScheduleConfig
from elas.optim.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=1.0)


def rate(step, kind, total=100, **settings):
    return learning_rate(
        step, total, OPTIMIZER, ScheduleConfig(kind=kind, warmup_steps=10, min_lr_ratio=0.1, **settings)
    )


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_a_straight_line_to_the_peak(kind):
    assert [rate(step, kind) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_ends_at_the_minimum_and_is_halfway_in_the_middle():
    assert rate(55, "cosine") == pytest.approx(0.55)
    assert rate(100, "cosine") == pytest.approx(0.1)
    assert all(rate(step, "cosine") > rate(step + 1, "cosine") for step in range(10, 100))


def test_wsd_is_flat_then_falls_over_its_last_steps():
    assert {rate(step, "wsd", decay_steps=20) for step in range(10, 81)} == {1.0}
    assert rate(90, "wsd", decay_steps=20) == pytest.approx(0.55)
    assert rate(100, "wsd", decay_steps=20) == pytest.approx(0.1)
    assert rate(89, "wsd") == 1.0 and rate(91, "wsd") < 1.0  # a tenth of the run by default


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(1, 100, OPTIMIZER, ScheduleConfig(kind="constant", warmup_steps=0)) == 1.0


def test_restarts_ramp_back_to_the_cosine_after_each_refresh():
    optimizer = OptimizerConfig(lr=1.0, kind="loro", exact_every=20)

    def both(step):
        kinds = (ScheduleConfig(kind=kind, warmup_steps=10) for kind in ("cosine_restart", "cosine"))
        return [learning_rate(step, 100, optimizer, kind) for kind in kinds]

    for step in range(1, 101):
        restarted, plain = both(step)
        since = (step - 1) % 20 + 1
        assert restarted == pytest.approx(plain * (min(1.0, since / 5) if step > 20 else 1.0)), step
    assert both(20)[0] == both(20)[1] and both(21)[0] == pytest.approx(both(21)[1] / 5) and both(25)[0] == both(25)[1]
