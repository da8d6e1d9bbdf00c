"""What is computed again in the backward pass has the same bits: losses and gradient norms of 20 steps are equal.

So every layout is compared with itself, with and without recomputation.
"""

from functools import lru_cache

import pytest
from support.parity_run import curve
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

STEPS = 20
SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}
CASES = {  # name: (ranks, overrides)
    "elas": (1, {}),
    "grouped queries": (1, {"model.num_query_groups": 2}),
    "swiglu": (1, SWIGLU),
    "cola": (1, {"low_rank.kind": "cola", **SWIGLU}),
    "loro": (1, {"optimizer.kind": "loro", "optimizer.exact_every": 7}),
    "muon": (1, {"optimizer.kind": "muon"}),
    "tied": (1, {"model.tie_embeddings": True}),
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2-sp swiglu": (2, {"parallel.tensor": 2, "parallel.sequence": True, **SWIGLU}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2-interleaved": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "dp2-zero2": (2, {"parallel.zero": 2}),
    "dp2-zero3": (2, {"parallel.zero": 3}),
    "dp2-zero3 swiglu": (2, {"parallel.zero": 3, **SWIGLU}),
    "tp2-sp-pp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
}


@lru_cache
def of(case: str, recompute: str) -> list[tuple[float, float]]:
    ranks, overrides = CASES[case]
    return run_ranks(ranks, curve, {**overrides, "train.recompute": recompute}, steps=STEPS)[0]


@pytest.mark.parametrize("recompute", ["bottleneck", "layer"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits(case, recompute):
    assert of(case, recompute) == of(case, "none")
