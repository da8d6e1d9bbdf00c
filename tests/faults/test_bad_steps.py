"""A NaN on one rank: agreed on by all, skipped, counted, and named when it does not end."""

import math

import bad_steps
import pytest
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

LAYOUTS = {
    "zero0": {"parallel.zero": 0},
    "zero1": {"parallel.zero": 1},
    "zero2": {"parallel.zero": 2},
    "zero3": {"parallel.zero": 3},
    "tp2-pp2-zero1": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1},
    "loro-tp2-zero1": {"parallel.tensor": 2, "parallel.zero": 1, "optimizer.kind": "loro"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_of_four(layout, dtype):
    overrides = {**LAYOUTS[layout], "train.dtype": dtype}
    ranks = run_ranks(4, bad_steps.train, overrides, 3, (3, 5))
    (losses, unchanged, culprit), *others = ranks
    assert all(repr(other[0]) == repr(losses) and other[2] == culprit for other in others)
    bad = [not (math.isfinite(loss) and math.isfinite(norm)) for loss, norm in losses]
    assert bad == [step in (3, 5) for step in range(8)]
    assert all(not math.isfinite(losses[step][1]) for step in (3, 5))
    assert unchanged and all(other[1] for other in others), "a bad step changed weights or moments"
    assert losses[-1][0] < losses[0][0]
    assert culprit == "decoder.layers.3 (its output, on rank 3)"


@pytest.mark.parametrize("layout", ["zero1", "zero2"])
def test_a_gradient_alone(layout):
    losses, unchanged, culprit = run_ranks(4, bad_steps.train, LAYOUTS[layout], 2, (4,), where="gradient")[0]
    assert math.isfinite(losses[4][0]) and not math.isfinite(losses[4][1]) and unchanged
    assert culprit.startswith("decoder.layers.3 (the gradient of its output") or "layers.2" in culprit
