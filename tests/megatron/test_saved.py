"""Megatron-core's distributed checkpoints hold every weight, and load into any layout, for every kind of layer."""

import pytest
from saved import cross_over, dense_steps_travel
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(("written", "read"), [("tp2", "tp2"), ("tp2", "tp1"), ("tp2 pp2", "tp1"), ("tp1", "tp2 pp2")])
def test_weights_cross_over(written, read, tmp_path):
    """Equal to the last bit: nothing is computed."""
    for problems in run_ranks(4, cross_over, written, read, str(tmp_path), timeout=300.0):
        assert problems == {}


def test_a_checkpoint_is_evaluated_as_it_was_trained(tmp_path):
    for past, before in run_ranks(4, dense_steps_travel, str(tmp_path), timeout=300.0):
        assert len(past) == len(before) == 4
        assert all(past) and not any(before)
