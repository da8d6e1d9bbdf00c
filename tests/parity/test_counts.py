"""A model has as many parameters as its shapes say, whatever layout counts them."""

import count_run
import pytest
from support.ranks import run_ranks

LOW_RANK = {"low_rank.rank": 16}
TIED = {"model.tie_embeddings": True, "low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none"}
GROUPED = {"low_rank.kind": "cola", "model.num_query_groups": 2, "sparsity.kind": "none"}


def expected(tied: bool = False, full: bool = False, query_groups: int = 4) -> int:
    """Of `parity_run.SMALL`: h 64, 4 layers, 4 heads, d_ff 128, vocabulary 256."""
    h, f, r, kv = 64, 128, 16, 64 * query_groups // 4
    if full:
        layer = h * (h + 2 * kv) + h * h + h * 2 * f + f * h
    else:  # Q, K, V: a pair each; then the output, up and down projections
        layer = 3 * r * h + r * (h + 2 * kv) + 2 * r * h + 2 * (r * h + r * f)
    return 4 * (layer + 2 * h) + h + 256 * h * (1 if tied else 2)


@pytest.mark.parametrize("model, number", [
    (LOW_RANK, expected()), (TIED, expected(tied=True, full=True)), (GROUPED, expected(query_groups=2)),
], ids=["low rank", "full rank, tied", "CoLA, grouped"])  # fmt: skip
def test_every_layout_counts_each_parameter_once(model, number):
    def of(ranks: int, *layouts: dict) -> list[list[int]]:
        return run_ranks(ranks, count_run.counts, [{**model, **layout} for layout in layouts])

    tensor, pipeline = "parallel.tensor", "parallel.pipeline"
    two = of(2, {tensor: 2}, {tensor: 2, "parallel.sequence": True}, {pipeline: 2},
             {pipeline: 2, "parallel.virtual_pipeline": 2}, {"parallel.zero": 3}, {"parallel.zero": 1})  # fmt: skip
    assert two == [[number] * 6] * 2
    four = of(4, {tensor: 2, pipeline: 2}, {tensor: 2, "parallel.zero": 3}, {pipeline: 2, "parallel.zero": 1})
    assert four == [[number] * 3] * 4
