"""Two hosts and a slow link: tensor parallelism sends what the formula says, and less of it is less time."""

import statistics

import pytest
from lab import Lab, why_not
from link_study import SHAPE, measure

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
MBIT = 100.0


def test_a_slow_link_carries_what_the_formula_says(tmp_path):
    """As the kernel counts it on the network card: headers are 0.3 %, all else that is said is small."""
    small = {**SHAPE, "model.num_layers": 2, "train.micro_batch_size": 2, "train.global_batch_size": 2}
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab")
    try:
        lab.shape(lab.nodes[0], MBIT)
        full, ours = measure(lab, tmp_path, ("60m-full", "60m"), small, steps=3)
    finally:
        lab.close()
    for row in (full, ours):
        assert row["bytes"] == pytest.approx(row["formula_bytes"], rel=0.05)
        assert statistics.median(row["seconds"]) > 0.9 * row["bytes"] * 8 / (MBIT * 1e6)  # it was that slow
    assert ours["bytes"] < 0.6 * full["bytes"]
