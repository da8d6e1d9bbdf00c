"""Muon on every layout: twenty steps equal one process, within 2e-5 (fp32: sums of gradients in another order)."""

from functools import lru_cache

import pytest
from support.parity_run import curve
from support.ranks import run_ranks
from test_layouts import layout

pytestmark = pytest.mark.timeout(300)

STEPS = 20
MUON = {
    "optimizer.kind": "muon",
    "optimizer.lr": 0.006,
    "optimizer.lr_other": 0.003,
    "optimizer.weight_decay": 0.01,
}
ALONE = tuple(layout().items())
MODELS = {
    "elas": {},
    "grouped": {"model.num_query_groups": 2},
    "cola": {"low_rank.kind": "cola", "model.activation": "swiglu", "sparsity.kind": "none"},
    "full-swiglu": {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none"},
    "full-grouped": {"low_rank.kind": "none", "model.num_query_groups": 2},
    "spectron": {"optimizer.normalize": "spectron", "optimizer.lr": 0.05},
}
LAYOUTS = {
    "tp2": (2, layout(tensor=2)),
    "tp2-sp": (2, layout(tensor=2, sequence=True)),
    "pp2": (2, layout(pipeline=2)),
    "dp2-zero0": (2, layout(zero=0)),
    "dp2-zero1": (2, layout(zero=1)),
    "dp2-zero2": (2, layout(zero=2)),
    "dp2-zero3": (2, layout(zero=3)),
    "tp4": (4, layout(tensor=4)),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2)),
    "pp2-vpp2": (2, layout(pipeline=2) | {"parallel.virtual_pipeline": 2}),
    "tp2-dp2-zero1": (4, layout(tensor=2, zero=1)),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero=3)),
}


@lru_cache
def losses(ranks: int, parallel: tuple, model: str, changes: tuple = ()) -> list[float]:
    curves = run_ranks(ranks, curve, {**MUON, **MODELS[model], **dict(parallel), **dict(changes)}, steps=STEPS)
    assert all(other == curves[0] for other in curves), "ranks report different losses or norms"
    return [loss for loss, _ in curves[0]]


def deviation(ranks: int, parallel: dict, model: str, changes: tuple = ()) -> float:
    both = zip(losses(ranks, tuple(parallel.items()), model, changes), losses(1, ALONE, model), strict=True)
    return max(abs(x / y - 1) for x, y in both)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(name):
    assert deviation(*LAYOUTS[name], "elas") <= 2e-5


@pytest.mark.parametrize("model", [name for name in MODELS if name != "elas"])
@pytest.mark.parametrize("name", ["tp2-pp2", "dp2-zero3"])
def test_every_model_takes_the_same_steps(model, name):
    """Stacked weights are their own matrices whether they are split or not."""
    assert deviation(*LAYOUTS[name], model) <= 2e-5


def test_models_and_normalisations_are_not_the_same():
    curves = {tuple(losses(1, ALONE, model)) for model in MODELS}
    assert len(curves) == len(MODELS)
    assert all(curve[-1] < curve[0] - 0.1 for curve in curves)


def test_bf16_follows_fp32():
    assert deviation(1, layout(), "elas", (("train.dtype", "bfloat16"),)) <= 2e-2
    assert deviation(2, layout(zero=1), "elas", (("train.dtype", "bfloat16"),)) <= 2e-2

