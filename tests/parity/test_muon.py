"""Muon on every layout: twenty steps equal one process, within 2e-5 (fp32: sums of gradients in another order)."""

import math
from functools import lru_cache

import pytest
from support.collectives import CountSent
from support.parity_run import SMALL, curve, tokens
from support.ranks import run_ranks
from test_layouts import layout

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

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
    "full-grouped": {"low_rank.kind": "none", "model.num_query_groups": 2, "sparsity.kind": "none"},
    "spectron": {"optimizer.normalize": "spectron", "optimizer.lr": 0.025},
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


SHORT = 10
"""Steps of other models than ELAS."""
WHOLE = ("elas", "spectron")
"""Trained for all steps, on every layout: plain Muon, and what the presets have."""


def curve_without_a_part(overrides: dict, steps: int) -> list[tuple[float, float]]:
    """On a rank: as `curve`, but rank 1 leaves its part out of every matrix that is gathered."""
    from elas.engine.exchange import Exchange

    contributed = Exchange._contributed
    Exchange._contributed = lambda self, rows, k, owner: () if k == 1 else contributed(self, rows, k, owner)
    try:
        return curve(overrides, steps=steps)
    finally:
        Exchange._contributed = contributed


def exchanged(overrides: dict) -> tuple[int, int, dict[str, list[int]]]:
    """On a rank: bytes that a step says it sent, bytes that it gave to all-to-alls for others, and what it holds."""
    from elas import parallel
    from elas.config import load_config
    from elas.engine.cycles import cycle_of
    from elas.engine.engine import Engine
    from elas.engine.zero import fragments

    config = load_config(None, {**SMALL, **overrides, "sparsity.dense_steps": 0})
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    cycle = cycle_of(engine)
    engine.set_learning_rate(1e-3)
    samples = tokens(0)[: config.train.micro_batch_size]
    with CountSent() as counted:
        engine.step((samples[:, :-1], samples[:, 1:]) for _ in range(engine.micro_batches))
    held = fragments(engine)
    facts = {"numbers": [], "held": []}  # of each matrix
    for (rows,) in cycle.units:
        columns = cycle.exchange.shape(rows)[1] // (config.parallel.tensor if rows.split_dim == 1 else 1)
        here = held.get(rows.parameter)
        mine = set(range(here.start, here.start + here.numel)) if here else set()
        wanted = {i for first, count in rows.runs for i in range(first * columns, (first + count) * columns)}
        facts["numbers"].append(math.prod(cycle.exchange.shape(rows)))
        facts["held"].append(len(mine & wanted))
    return cycle.end(1, 1e-3).bytes, counted.bytes, facts


def expected_bytes(ranks: list[dict]) -> int:
    """That all ranks of a stage send: to a matrix's owner what it lacks, and back to each other one what that holds."""
    total = 0
    for number, whole in enumerate(ranks[0]["numbers"]):
        held = [one["held"][number] for one in ranks]
        owner = number % len(ranks)
        total += whole - held[owner] + sum(held) - held[owner]
    return 4 * total


@lru_cache
def losses(ranks: int, parallel: tuple, model: str, steps: int, changes: tuple = (), job=curve) -> list[float]:
    curves = run_ranks(ranks, job, {**MUON, **MODELS[model], **dict(parallel), **dict(changes)}, steps=steps)
    assert all(other == curves[0] for other in curves), "ranks report different losses or norms"
    return [loss for loss, _ in curves[0]]


def deviation(ranks: int, parallel: dict, model: str, steps: int = STEPS, changes: tuple = (), job=curve) -> float:
    ours = losses(ranks, tuple(parallel.items()), model, steps, changes, job)
    return max(abs(x / y - 1) for x, y in zip(ours, losses(1, ALONE, model, steps), strict=True))


@pytest.mark.parametrize("model", WHOLE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(name, model):
    assert deviation(*LAYOUTS[name], model) <= 2e-5


@pytest.mark.parametrize("model", [name for name in MODELS if name not in WHOLE])
@pytest.mark.parametrize("name", ["tp2-pp2", "dp2-zero0", "dp2-zero3"])
def test_every_model_takes_the_same_steps(model, name):
    """Stacked weights are their own matrices whether they are split or not."""
    assert deviation(*LAYOUTS[name], model, SHORT) <= 2e-5


@pytest.mark.parametrize("name", ["tp2", "dp2-zero1"])
def test_a_part_that_is_left_out_is_noticed(name):
    assert deviation(*LAYOUTS[name], "elas", SHORT, job=curve_without_a_part) > 1e-3


def test_models_and_normalizations_are_not_the_same():
    curves = {tuple(losses(1, ALONE, model, SHORT)) for model in MODELS}
    assert len(curves) == len(MODELS)
    assert all(curve[-1] < curve[0] - 0.1 for curve in curves)


@pytest.mark.parametrize("model", WHOLE)
def test_bf16_follows_fp32(model):
    bf16 = (("train.dtype", "bfloat16"),)
    assert deviation(1, layout(), model, STEPS, bf16) <= 2e-2
    alone = losses(1, ALONE, model, STEPS, bf16)
    for name in ("tp2-pp2", "dp2-zero1", "dp2-zero3"):
        ranks, parallel = LAYOUTS[name]
        ours = losses(ranks, tuple(parallel.items()), model, STEPS, bf16)
        assert max(abs(x / y - 1) for x, y in zip(ours, alone, strict=True)) <= 2e-3


@pytest.mark.parametrize("name", ["tp2", "dp2-zero1", "dp2-zero3", "tp2-dp2-zero1"])
def test_a_step_sends_what_owners_lack_and_holders_need(name):
    ranks, parallel = LAYOUTS[name]
    found = run_ranks(ranks, exchanged, {**MUON, **parallel})
    assert all(said == counted > 0 for said, counted, _ in found)
    assert sum(said for said, _, _ in found) == expected_bytes([facts for _, _, facts in found])


def test_a_stage_of_one_rank_sends_nothing():
    assert [said for said, _, _ in run_ranks(2, exchanged, {**MUON, **LAYOUTS["pp2"][1]})] == [0, 0]
