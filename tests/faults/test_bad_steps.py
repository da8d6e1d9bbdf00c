"""A NaN on one rank: agreed on by all, skipped, counted, and named when it does not end."""

import math

import bad_steps
import pytest
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

LAYOUTS = {
    "zero0": {"parallel.zero": 0},
    "zero1": {"parallel.zero": 1},
    "zero2": {"parallel.zero": 2},
    "zero3": {"parallel.zero": 3},
    "tp2-pp2-zero1": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1},
    "loro-tp2-zero1": {"parallel.tensor": 2, "parallel.zero": 1, "optimizer.kind": "loro"},
    "muon-tp2-zero1": {"parallel.tensor": 2, "parallel.zero": 1, "optimizer.kind": "muon"},
    "muon-zero0": {"parallel.zero": 0, "optimizer.kind": "muon"},
    "muon-zero3": {"parallel.zero": 3, "optimizer.kind": "muon"},
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


def with_nans_in_padding() -> tuple[int, bool, tuple | None, bool]:
    """On a rank: padded weights here, whether all are finite and which is not; the former after a NaN in a weight."""
    from support.parity_run import SMALL

    from elas import parallel
    from elas.config import load_config
    from elas.engine import nonfinite
    from elas.engine.engine import Engine

    config = load_config(None, {**SMALL, "parallel.zero": 3, "train.global_batch_size": 6})
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    padded = 0
    parameters = list(engine.chunks[0].parameters())
    for parameter in parameters:
        held = parameter.ds_tensor.view(-1)
        padding = held[max(0, parameter.ds_numel - engine.layout.dp_rank * held.numel()) :]
        padding.fill_(float("nan"))
        padded += bool(padding.numel())
    finite, name = engine.is_finite(), nonfinite._bad_weights(engine)
    parameters[0].ds_tensor.view(-1)[0] = float("nan")
    return padded, finite, name, engine.is_finite()


def test_padding_of_zero_3_does_not_count():
    """DeepSpeed does not initialise it; weights whose size three ranks do not divide have some."""
    found = run_ranks(3, with_nans_in_padding)
    assert sum(padded for padded, *_ in found) > 10
    assert all(one == (True, None, False) for _, *rest in found for one in [tuple(rest)])
