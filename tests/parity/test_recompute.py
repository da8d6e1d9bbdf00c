"""What is computed again in the backward pass has the same bits: losses and gradient norms of 20 steps are equal.

So every layout is compared with itself, with and without recomputation.
"""

from functools import lru_cache

import pytest
from support.parity_run import SMALL, curve
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


def kept(overrides: dict) -> tuple[int, int]:
    """On a rank: bytes that its layers keep of one micro-batch, measured and by formula."""
    import torch

    from elas import parallel
    from elas.bench.account import measure_step
    from elas.bench.step_models import Ours
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.model.activation import set_step
    from elas.plan.memory import token_bytes

    settings = {**SMALL, "model.seq_length": 64, "sparsity.dense_steps": 0, "train.global_batch_size": 4}
    config = load_config(None, {**settings, "train.micro_batch_size": 4, **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    model = Ours(Engine(config, layout))
    set_step(model.engine.chunks, 1)
    ids = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(7))
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    model.engine.step(iter(batch))
    account = measure_step(lambda: model.engine.step(iter(batch)), model, torch.device("cpu"))
    tokens, layers = 4 * 64, config.model.num_layers // config.parallel.pipeline
    return account.layers, int(layers * tokens * token_bytes(config, 4))


MEMORY = {  # name: (ranks, overrides)
    "elas": (1, {}),
    "swiglu": (1, SWIGLU),
    "cola": (1, {"low_rank.kind": "cola", **SWIGLU}),
    "grouped queries": (1, {"model.num_query_groups": 2}),
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2-sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "tp2-sp cola": (2, {"parallel.tensor": 2, "parallel.sequence": True, "low_rank.kind": "cola", **SWIGLU}),
    "full rank": (1, {"low_rank.kind": "none", **SWIGLU}),
    "full rank, grouped queries": (1, {"low_rank.kind": "none", "model.num_query_groups": 2, **SWIGLU}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "dp2-zero3": (2, {"parallel.zero": 3, "train.global_batch_size": 8}),
    "dp2-zero3 swiglu": (2, {"parallel.zero": 3, "train.global_batch_size": 8, **SWIGLU}),
}


@pytest.mark.parametrize("recompute", ["none", "bottleneck", "layer"])
@pytest.mark.parametrize("case", MEMORY)
def test_layers_keep_what_the_formula_says(case, recompute):
    ranks, overrides = MEMORY[case]
    if "full" in case and recompute == "bottleneck":
        pytest.skip("full rank has no bottleneck")
    measured, expected = run_ranks(ranks, kept, {**overrides, "train.recompute": recompute})[0]
    assert measured == pytest.approx(expected, rel=0.01)
