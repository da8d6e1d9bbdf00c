"""FLOPs of a step by formula against those that torch counts, and against known models."""

import pytest
from support.ranks import run_ranks

from elas.config import load_config
from elas.plan.flops import hardware_flops, model_flops, twin_flops

pytestmark = pytest.mark.timeout(300)

SEQUENCE, BATCH = 64, 4
MODELS = {
    "elas": {},
    "elas, recompute none": {"train.recompute": "none"},
    "elas, recompute layer": {"train.recompute": "layer"},
    "dense relu2": {"sparsity.kind": "none", "sparsity.ffn_memory": "eager"},
    "swiglu": {"model.activation": "swiglu", "sparsity.kind": "none"},
    "swiglu, recompute none": {"model.activation": "swiglu", "sparsity.kind": "none", "train.recompute": "none"},
    "full-rank swiglu": {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none"},
    "full-rank relu2": {"low_rank.kind": "none"},
    "grouped queries": {"model.num_query_groups": 2, "train.recompute": "none"},
    "cola": {"low_rank.kind": "cola", "model.activation": "swiglu", "sparsity.kind": "none"},
    "tied": {"model.tie_embeddings": True},
}


def settings(model: str) -> dict:
    shape = {"model.hidden_size": 64, "model.num_layers": 2, "model.num_attention_heads": 4, "low_rank.rank": 16}
    shape |= {"model.ffn_hidden_size": 192, "model.vocab_size": 512, "model.seq_length": SEQUENCE}
    shape |= {"train.dtype": "float32", "train.micro_batch_size": BATCH, "train.global_batch_size": BATCH}
    chosen = {**shape, "sparsity.dense_steps": 0, **MODELS[model]}
    if chosen.get("sparsity.ffn_memory") != "eager" and chosen.get("sparsity.kind") != "none":
        chosen["sparsity.implementation"] = "torch"  # whose products torch sees
    return chosen


def counted(model: str) -> dict[str, float]:
    """On a rank: FLOPs of a step for each token, of products and of attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, mm_flop

    from elas import parallel
    from elas.engine.engine import Engine
    from elas.model.activation import set_step

    config = load_config(None, settings(model))
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    set_step(engine.chunks, 1)
    ids = torch.randint(512, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    engine.step(iter(batch))
    aten = torch.ops.aten
    attention = {"forward": 0, "backward": 0}

    def scores(which: str, products: int):
        def count(q, k, *_args, out_shape=None, **_kwargs):
            attention[which] += products
            b, heads, s, width = q if which == "forward" else k
            return products * b * heads * s * s * width  # half of 2·s·s: causal

        return count

    added = {
        aten.addmm_: lambda _c, a, b, out_shape=None, **_: mm_flop(a, b),
        aten._scaled_dot_product_flash_attention_for_cpu: scores("forward", 2),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: scores("backward", 4),
    }
    with FlopCounterMode(display=False, custom_mapping=added) as mode:
        engine.step(iter(batch))
    assert attention["forward"] and attention["backward"]
    return mode.get_total_flops() / (BATCH * SEQUENCE)


@pytest.mark.parametrize("model", MODELS)
def test_hardware_flops_are_those_that_torch_counts(model):
    (found,) = run_ranks(1, counted, model)
    assert hardware_flops(load_config(None, settings(model))) == pytest.approx(found, rel=0.005)


def test_six_flops_a_parameter():
    """Without attention's scores, a token needs 6 FLOPs for each weight that takes part in a product."""
    for preset in ("60m", "350m-full", "7b"):
        config = load_config(preset)
        from elas.plan.counts import parameter_count

        model = config.model
        weights = parameter_count(config) - model.vocab_size * model.hidden_size  # the embedding is looked up
        weights -= (2 * model.num_layers + 1) * model.hidden_size  # norms
        found = model_flops(config)
        assert found.training - 3 * found.scores == pytest.approx(6 * weights, rel=1e-9)


def test_the_twin_of_a_full_rank_llama_is_itself():
    config = load_config("350m-full")
    assert config.model.activation == "swiglu"
    assert twin_flops(config) == model_flops(config)
    assert twin_flops(load_config("350m")).training > 1.5 * model_flops(load_config("350m")).training
