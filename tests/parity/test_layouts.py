"""Every layout trains the same model: ten steps on any TP × PP × DP × ZeRO equal ten steps on one process.

Tolerances, relative, at every step: 2e-5 on the loss and 5e-4 on the gradient norm in fp32. A layout changes only the
order of sums, worth about 1e-7 (all that is seen without 2:4). Now and then that swaps two nearly equal activations in
a 2:4 group: here in one to three steps of the ten, moving that step's gradient norm by up to 5e-5 and its loss by up to
4e-6. Dropping one owed sum moves norms by 1e-2 (`test_a_missing_sum_is_noticed`). In bf16 losses agree within 2e-3:
eight bits of mantissa.
"""

from functools import lru_cache

import pytest
from support.parity_run import DENSE_STEPS, SMALL, STEPS, curve, seen_by_adam
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

LOSS_TOLERANCE, NORM_TOLERANCE = 2e-5, 5e-4
BF16_LOSS_TOLERANCE = 2e-3


def layout(tensor=1, pipeline=1, zero=1, sequence=False, virtual=1) -> dict:
    sizes = {"tensor": tensor, "pipeline": pipeline, "zero": zero, "sequence": sequence, "virtual_pipeline": virtual}
    return {f"parallel.{key}": value for key, value in sizes.items()}


TP2, TP2_SP = layout(tensor=2), layout(tensor=2, sequence=True)
PP2, PP2_INTERLEAVED = layout(pipeline=2), layout(pipeline=2, virtual=2)
ZERO = [layout(zero=stage) for stage in range(4)]

LAYOUTS = {  # name: (ranks, layout); what tensor and pipeline leave is data parallel
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2_SP),
    "tp2-zero0": (2, layout(tensor=2, zero=0)),
    "pp2": (2, PP2),
    "pp2-zero0": (2, layout(pipeline=2, zero=0)),
    "pp2-interleaved": (2, PP2_INTERLEAVED),
    "dp2-zero0": (2, ZERO[0]),
    "dp2-zero1": (2, ZERO[1]),
    "dp2-zero2": (2, ZERO[2]),
    "dp2-zero3": (2, ZERO[3]),
    "tp4": (4, layout(tensor=4)),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2)),
    "tp2-sp-pp2": (4, layout(tensor=2, pipeline=2, sequence=True)),
    "tp2-dp2-zero2": (4, layout(tensor=2, zero=2)),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero=3)),
    "tp2-sp-dp2-zero3": (4, layout(tensor=2, zero=3, sequence=True)),
    "pp2-dp2-zero1": (4, layout(pipeline=2, zero=1)),
}

TIED = {"model.tie_embeddings": True}
GQA = {"model.num_query_groups": 2}
SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}
VARIANTS = {
    "full-rank swiglu": {"low_rank.kind": "none", **SWIGLU},
    "low-rank swiglu": SWIGLU,
    "full-rank relu2 2:4": {"low_rank.kind": "none"},
    "cola": {"low_rank.kind": "cola", **SWIGLU},
    "cola relu2 2:4": {"low_rank.kind": "cola", "low_rank.activation": "relu2", "model.activation": "swiglu"},
}


@lru_cache
def one_process(model: tuple) -> list[tuple[float, float]]:
    return run_ranks(1, curve, {**dict(model), **layout()})[0]


def deviations(ranks: int, model: dict, parallel: dict, **kwargs) -> tuple[float, float]:
    """Largest relative deviation of the losses and of the gradient norms from one process; ranks must agree exactly."""
    expected = one_process(tuple(sorted(model.items())))
    curves = run_ranks(ranks, curve, {**model, **parallel}, **kwargs)
    assert all(other == curves[0] for other in curves), "ranks report different losses or norms"
    losses, norms = zip(*([abs(x / y - 1) for x, y in zip(*step)] for step in zip(curves[0], expected, strict=True)))
    print(f"loss {max(losses):.1e}, norm {max(norms):.1e}")
    return max(losses), max(norms)


def check(ranks: int, model: dict, parallel: dict) -> None:
    loss, norm = deviations(ranks, model, parallel)
    assert loss < LOSS_TOLERANCE
    assert norm < NORM_TOLERANCE


def test_the_curve_is_worth_comparing():
    """The loss falls, clipping bites at every step, and 2:4 changes what follows it and nothing before."""
    losses, norms = zip(*one_process(()))
    dense, _ = zip(*one_process((("sparsity.kind", "none"),)))
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    assert min(norms) > 1.5 * SMALL["optimizer.clip_grad"]
    assert losses[:DENSE_STEPS] == dense[:DENSE_STEPS]
    assert abs(losses[DENSE_STEPS] / dense[DENSE_STEPS] - 1) > 5 * LOSS_TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_elas(name):
    check(LAYOUTS[name][0], {}, LAYOUTS[name][1])


@pytest.mark.parametrize("parallel", [PP2, PP2_INTERLEAVED, TP2], ids=["pp2", "pp2-interleaved", "tp2"])
def test_tied_embeddings(parallel):
    check(2, TIED, parallel)


def test_tied_embeddings_under_tensor_and_pipeline_parallelism():
    check(4, TIED, layout(tensor=2, pipeline=2, sequence=True))


def test_grouped_query_attention():
    check(2, GQA, TP2)


@pytest.mark.parametrize("parallel", [TP2_SP, PP2, ZERO[1], ZERO[3]], ids=["tp2-sp", "pp2", "dp2-zero1", "dp2-zero3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_models(variant, parallel):
    check(2, VARIANTS[variant], parallel)


@pytest.mark.parametrize("parallel", [*ZERO, TP2_SP, PP2], ids=["zero0", "zero1", "zero2", "zero3", "tp2-sp", "pp2"])
def test_documents_of_unequal_length(parallel):
    """The loss is the mean over all labels that count, wherever they lie: not a mean of the ranks' means."""
    check(2, {"data.packing": "document"}, parallel)


@pytest.mark.parametrize("parallel", [*ZERO, TP2_SP, PP2], ids=["zero0", "zero1", "zero2", "zero3", "tp2-sp", "pp2"])
def test_bf16(parallel):
    loss, _ = deviations(2, {"train.dtype": "bfloat16"}, parallel)
    assert loss < BF16_LOSS_TOLERANCE


def test_bf16_follows_fp32():
    """The losses stay beside the fp32 curve."""
    losses, _ = zip(*one_process((("train.dtype", "bfloat16"),)))
    expected, _ = zip(*one_process(()))
    assert max(abs(x / y - 1) for x, y in zip(losses, expected)) < BF16_LOSS_TOLERANCE


CLIPPED = {  # name: (ranks, settings)
    "tp2-zero0": (2, layout(tensor=2, zero=0)),
    "tp2-zero0-loro": (2, {**layout(tensor=2, zero=0), "optimizer.kind": "loro", "optimizer.exact_every": 100}),
    "tp2-zero1": (2, TP2),
    "pp2-tied-zero0": (2, {**layout(pipeline=2, zero=0), **TIED}),
    "pp2-tied-zero1": (2, {**PP2, **TIED}),
    "dp2-zero0": (2, ZERO[0]),
    "dp2-zero2": (2, ZERO[2]),
    "dp2-zero3": (2, ZERO[3]),
    "tp4-zero0": (4, layout(tensor=4, zero=0)),
    "tp2-sp-pp2-tied-zero0": (4, {**layout(tensor=2, pipeline=2, sequence=True, zero=0), **TIED}),
    "tp2-sp-dp2-zero2": (4, layout(tensor=2, zero=2, sequence=True)),
    "tp2-sp-dp2-zero3": (4, layout(tensor=2, zero=3, sequence=True)),
}


@lru_cache
def norm_of_one_process(settings: tuple) -> float:
    return run_ranks(1, seen_by_adam, {**dict(settings), **layout(zero=0), "train.dtype": "bfloat16"})[0][0]


@pytest.mark.parametrize("name", CLIPPED)
def test_adam_sees_gradients_clipped_by_the_logged_norm(name):
    """In bf16, where gradients are rounded to eight bits before the norm is taken (2e-2), but not after it (1e-4)."""
    ranks, settings = CLIPPED[name]
    model = {key: value for key, value in settings.items() if not key.startswith("parallel.")}
    limit = SMALL["optimizer.clip_grad"]
    for logged, seen in run_ranks(ranks, seen_by_adam, {**settings, "train.dtype": "bfloat16"}):
        assert logged == pytest.approx(norm_of_one_process(tuple(model.items())), rel=2e-2)
        assert logged > 1.5 * limit
        assert seen == pytest.approx(limit, rel=1e-4)


def test_what_the_ffn_keeps_does_not_change_the_curve():
    """Bit for bit: compressed memory restores the activation exactly."""
    assert one_process((("sparsity.ffn_memory", "eager"),)) == one_process((("sparsity.ffn_memory", "compressed"),))


def test_a_missing_sum_is_noticed():
    """Without the sum over sequence shards the replicated factors' gradients are partial: far outside the tolerance."""
    loss, norm = deviations(2, {}, TP2_SP, fault="sum_sequence_partial")
    assert loss > 5 * LOSS_TOLERANCE
    assert norm > 5 * NORM_TOLERANCE


def test_a_missing_average_is_noticed():
    """Without the average over data-parallel ranks, each goes its own way."""
    curves = run_ranks(2, curve, ZERO[0], fault="average_over_data_parallel")
    expected = one_process(())
    assert any(abs(x / y - 1) > 5 * NORM_TOLERANCE for ranks in curves for (_, x), (_, y) in zip(ranks, expected))
