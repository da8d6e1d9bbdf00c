"""The traffic of a step that a plan states is what its collectives send, to the byte but for a few single numbers."""

import pytest
from support.ranks import run_ranks
from traffic_cases import of_matrices, sent_and_planned

pytestmark = pytest.mark.timeout(300)

SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}
FULL = {"low_rank.kind": "none", **SWIGLU}
LAYER = {"train.recompute": "layer"}
LARGE = {"model.vocab_size": 4096, "model.hidden_size": 128}
"""Tables that ZeRO 3 does not keep whole."""


def layout(**sizes) -> dict:
    return {f"parallel.{key}": value for key, value in sizes.items()}


TP2, SP2 = layout(tensor=2), layout(tensor=2, sequence=True)
CASES = {
    "tp2": (2, TP2),
    "tp2 swiglu": (2, {**TP2, **SWIGLU}),
    "tp2 full rank": (2, {**TP2, **FULL}),
    "tp2 layers again": (2, {**TP2, **LAYER}),
    "tp2-sp": (2, SP2),
    "tp2-sp full rank": (2, {**SP2, **FULL}),
    "tp2-sp bf16": (2, {**SP2, "train.dtype": "bfloat16"}),
    "pp2": (2, layout(pipeline=2)),
    "pp2-interleaved": (2, layout(pipeline=2, virtual_pipeline=2)),
    "pp2 tied": (2, {**layout(pipeline=2), "model.tie_embeddings": True}),
    "pp4": (4, layout(pipeline=4)),
    "dp2-zero0": (2, layout(zero=0)),
    "dp2-zero1": (2, layout(zero=1)),
    "dp2-zero1 bf16": (2, {**layout(zero=1), "train.dtype": "bfloat16"}),
    "dp2-zero2": (2, layout(zero=2)),
    "dp2-zero2 bf16": (2, {**layout(zero=2), "train.dtype": "bfloat16"}),
    "dp2-zero3": (2, layout(zero=3)),
    "dp2-zero3 large weights": (2, {**layout(zero=3), **LARGE}),
    "dp4-zero1": (4, layout(zero=1)),
    "tp2-sp-pp2": (4, layout(tensor=2, sequence=True, pipeline=2)),
    "tp2-dp2-zero1": (4, layout(tensor=2, zero=1)),
    "tp2-sp-dp2-zero2": (4, layout(tensor=2, sequence=True, zero=2)),
    "tp2-dp2-zero3 large weights": (4, {**layout(tensor=2, zero=3), **LARGE}),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_is_counted(case):
    ranks, overrides = CASES[case]
    results = run_ranks(ranks, sent_and_planned, overrides)
    sent, planned = max(sent for sent, _ in results), results[0][1]
    assert planned == pytest.approx(sent, rel=1e-3, abs=300), f"sent {sent:,.0f}, planned {planned:,.0f}"


MUON = {
    "tp2": (2, TP2),
    "tp2 swiglu": (2, {**TP2, **SWIGLU}),
    "tp2 full rank": (2, {**TP2, **FULL}),
    "pp2": (2, layout(pipeline=2)),
    "tp2-pp2 grouped": (4, {**layout(tensor=2, pipeline=2), "model.num_query_groups": 2}),
    "dp2-zero0": (2, layout(zero=0)),
    "dp2-zero1": (2, layout(zero=1)),
    "dp2-zero1 spectron": (2, {**layout(zero=1), "optimizer.normalize": "spectron"}),
    "dp2-zero3": (2, layout(zero=3)),
    "dp4-zero2": (4, layout(zero=2)),
    "tp2-dp2-zero0": (4, layout(tensor=2, zero=0)),
    "tp2-dp2-zero1": (4, layout(tensor=2, zero=1)),
}


@pytest.mark.parametrize("case", MUON)
def test_planned_for_matrices_is_counted(case):
    """The mean of all ranks; where ZeRO cuts its partitions is not planned."""
    ranks, overrides = MUON[case]
    results = run_ranks(ranks, of_matrices, overrides)
    sent = sum(sent for sent, _ in results) / ranks
    assert results[0][1] == pytest.approx(sent, rel=0.05), f"sent {sent:,.0f}, planned {results[0][1]:,.0f}"
