"""LORO on every layout: twenty steps with exact steps at 5, 10 and 15 equal one process.

Losses agree within 2e-5 up to the first exact step, and within 1e-3 after it: nearly equal singular values let the
basis turn a little with the order of a sum, and Adam, element by element, sees the basis.
"""

from functools import lru_cache

import pytest
from support.parity_run import curve, exact_step_of_a_poor_factor
from support.ranks import run_ranks
from test_layouts import layout

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

STEPS, EXACT_EVERY = 20, 5
LORO = {
    "optimizer.kind": "loro",
    "optimizer.exact_every": EXACT_EVERY,
    "optimizer.lr": 0.01,
    "optimizer.beta2": 0.999,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
}
LAYOUTS = {
    "tp2": (2, layout(tensor=2)),
    "tp2-sp": (2, layout(tensor=2, sequence=True)),
    "pp2": (2, layout(pipeline=2)),
    "dp2-zero0": (2, layout(zero=0)),
    "dp2-zero1": (2, layout(zero=1)),
    "dp2-zero2": (2, layout(zero=2)),
    "dp2-zero3": (2, layout(zero=3)),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2)),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero=3)),
}


@lru_cache
def losses(ranks: int, parallel: tuple, changes: tuple = ()) -> list[float]:
    curves = run_ranks(ranks, curve, {**LORO, **dict(parallel), **dict(changes)}, steps=STEPS)
    assert all(other == curves[0] for other in curves), "ranks report different losses or norms"
    return [loss for loss, _ in curves[0]]


def one_process(**changes) -> list[float]:
    return losses(1, tuple(layout().items()), tuple((f"optimizer.{k}", v) for k, v in changes.items()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(name):
    ranks, parallel = LAYOUTS[name]
    deviations = [abs(x / y - 1) for x, y in zip(losses(ranks, tuple(parallel.items())), one_process(), strict=True)]
    print(f"before {max(deviations[:EXACT_EVERY]):.1e}, after {max(deviations[EXACT_EVERY:]):.1e}")
    assert max(deviations[:EXACT_EVERY]) < 2e-5
    assert max(deviations[EXACT_EVERY:]) < 1e-3


def test_exact_steps_and_refreshes_each_change_the_curve():
    """And nothing before the first of them; without either, LORO's step is Adam's with its factors held back."""
    curves = {
        "exact and refresh": one_process(),
        "exact": one_process(refresh="none"),
        "refresh": one_process(refresh="only"),
        "neither": one_process(refresh="none", exact_every=None),
    }
    first = {tuple(curve[:EXACT_EVERY]) for curve in curves.values()}
    after = {tuple(curve[EXACT_EVERY:]) for curve in curves.values()}
    assert len(first) == 1 and len(after) == 4
    assert all(curve[-1] < curve[0] - 0.1 for curve in curves.values())


def test_bf16_follows_fp32():
    """Eight bits of mantissa, and after exact steps a basis that turns with them."""
    bf16 = losses(1, tuple(layout().items()), (("train.dtype", "bfloat16"),))
    two = losses(2, tuple(layout(zero=1).items()), (("train.dtype", "bfloat16"),))
    for other in (one_process(), two):
        deviations = [abs(x / y - 1) for x, y in zip(bf16, other)]
        assert max(deviations[:EXACT_EVERY]) < 2e-3
        assert max(deviations[EXACT_EVERY:]) < 2e-2


@pytest.mark.parametrize("model", ({}, LORO), ids=("adamw", "loro"))
def test_zero_3_that_keeps_nothing_whole(model, tmp_path):
    """By default DeepSpeed keeps parameters as small as these on every rank; here it gathers each when it is used."""
    settings = tmp_path / "zero3.json"
    settings.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    parallel = {"parallel.deepspeed_config": str(settings)}
    sharded = run_ranks(2, curve, {**model, **parallel}, steps=STEPS)[0]
    alone = run_ranks(1, curve, {**model, **layout()}, steps=STEPS)[0]
    assert max(abs(x / y - 1) for (x, _), (y, _) in zip(sharded, alone)) < (1e-3 if model else 2e-5)


@pytest.mark.parametrize("ranks, parallel", [(1, layout()), (2, layout(tensor=2)), (2, layout(zero=2))])
def test_pairs_without_full_rank_step_approximately(ranks, parallel):
    reports = run_ranks(ranks, exact_step_of_a_poor_factor, {**LORO, **parallel})
    pairs, not_taken, moved = reports[0]
    assert all(other[:2] == (pairs, not_taken) for other in reports)
    assert (pairs, not_taken) == (24, 1) and moved
