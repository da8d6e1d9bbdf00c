"""Measurements of factor pairs: right on one process, and the same on every layout."""

import pytest
import torch
from support.parity_run import SMALL
from support.ranks import run_ranks
from test_layouts import layout

pytestmark = pytest.mark.timeout(300)


def measured(overrides: dict) -> dict:
    """On a rank: after two steps of Muon, what metrics.jsonl would have."""
    from support.parity_run import _step

    from elas import parallel
    from elas.config import load_config
    from elas.engine import balance
    from elas.engine.cycles import cycle_of
    from elas.engine.engine import Engine
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, "optimizer.kind": "muon", "optimizer.lr": 0.02, **overrides})
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    cycle = cycle_of(engine)
    for step in range(2):
        _step(engine, step, set_sparse, cycle)
    return balance.measure(engine)


def test_statistics_are_those_of_singular_values():
    from elas.engine.balance import statistics

    torch.manual_seed(0)
    out, into = torch.randn(40, 8) @ torch.diag(torch.logspace(0, -2, 8)), 3 * torch.randn(8, 24)
    found = statistics(out, into)
    singular = [torch.linalg.svdvals(one.double()) for one in (out, into)]
    product = torch.linalg.svdvals(out.double() @ into.double())[:8]
    share = product / product.sum()
    assert found["norm_ratio"] == pytest.approx(float(out.norm() / into.norm()), rel=1e-6)
    for name, values in zip(("condition_out", "condition_in"), singular):
        assert found[name] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
    assert found["effective_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


def test_a_factor_that_has_lost_rank_and_one_that_is_zero():
    from elas.engine.balance import WORST, statistics

    out = torch.ones(10, 3)
    assert statistics(out, torch.randn(3, 5))["condition_out"] == WORST
    assert statistics(out, torch.randn(3, 5))["effective_rank"] == pytest.approx(1, abs=1e-3)
    zero = statistics(torch.zeros(10, 3), torch.randn(3, 5))
    assert zero["condition_out"] == WORST and zero["norm_ratio"] < 1e-100 and zero["effective_rank"] == 1


@pytest.mark.parametrize("ranks, where", [(4, layout(tensor=2, pipeline=2)), (2, layout(zero=3))], ids=["4", "zero3"])
def test_every_layout_measures_the_same(ranks, where):
    (alone,) = run_ranks(1, measured, layout())
    assert len(alone["pairs"]["names"]) == 6 * SMALL["model.num_layers"]  # q, k, v, output, up, down
    for found in run_ranks(ranks, measured, where):
        assert found["pairs"]["names"] == alone["pairs"]["names"]
        for key in ("norm_ratio", "condition_out", "condition_in", "effective_rank"):
            assert found["pairs"][key] == pytest.approx(alone["pairs"][key], rel=1e-4)
    assert alone["pair_condition"] == max(alone["pairs"]["condition_out"] + alone["pairs"]["condition_in"])


def test_a_model_without_factors_has_none():
    assert run_ranks(1, measured, {**layout(), "low_rank.kind": "none"}) == [{}]
