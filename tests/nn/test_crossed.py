"""Weights move between `elas.nn` and the layers for Megatron-core by their names."""

import crossed
import pytest
from support.ranks import run_ranks


@pytest.mark.timeout(300)
def test_weights_move_to_megatrons_layers_by_name():
    (found,) = run_ranks(1, crossed.differences, timeout=200)
    for kind, (apart, difference) in found.items():
        assert apart == [], kind
        assert difference < 1e-6, kind  # the same fp32 operations; observed 0
