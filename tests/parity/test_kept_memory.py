"""What layers keep for the backward pass is what `elas.plan.memory` says, on every layout; on a CPU."""

import contextlib

import pytest
from support.parity_run import SMALL
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300)]

SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}


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
    from elas.plan_check.watch import copied_collectives

    settings = {**SMALL, "model.seq_length": 64, "sparsity.dense_steps": 0, "train.global_batch_size": 4}
    config = load_config(None, {**settings, "train.micro_batch_size": 4, **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    model = Ours(Engine(config, layout))
    set_step(model.engine.chunks, 1)
    ids = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(7))
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    model.engine.step(iter(batch))
    with copied_collectives() if config.parallel.tensor > 1 else contextlib.nullcontext():
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
