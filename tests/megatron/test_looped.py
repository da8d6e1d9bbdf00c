"""Megatron-core's own loop parts over our layers: DDP with overlaps, distributed optimizer, recomputation, counting."""

from functools import lru_cache

import pytest
from looped import count_steps_of, provider_refusals, recompute, train
from small import KINDS
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

OVERLAPS = {
    "distributed optimizer": {"use_distributed_optimizer": True},
    "overlap_grad_reduce": {"overlap_grad_reduce": True, "bucket_size": 100_000},
    **{
        f"both overlaps, buckets of {size}": {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "bucket_size": size,
        }
        for size in (150_000, 100_000)
    },
}
FULL_RANK = KINDS["full rank"]


@lru_cache
def reference(full_rank: bool) -> tuple[list[float], list[float]]:
    return run_ranks(2, train, FULL_RANK if full_rank else {}, timeout=300.0)[0]


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("options", OVERLAPS)
def test_overlaps_change_nothing(options, full_rank):
    """Sums of two ranks in buckets: 1e-7. Weights used while they are gathered change the third loss by 1e-3."""
    losses, norms = run_ranks(2, train, FULL_RANK if full_rank else {}, timeout=300.0, **OVERLAPS[options])[0]
    wanted_losses, wanted_norms = reference(full_rank)
    assert losses[0] > losses[-1] or losses[0] == pytest.approx(losses[-1], abs=0.1)
    assert losses == pytest.approx(wanted_losses, rel=2e-6)
    assert norms == pytest.approx(wanted_norms, rel=2e-4)


def test_tensor_parallel_equals_data_parallel():
    """As between layouts of `elas train`: 2e-5 of the loss and 5e-4 of the norm."""
    losses, norms = run_ranks(2, train, {}, tensor=2, timeout=300.0)[0]
    assert losses == pytest.approx(reference(False)[0], rel=2e-5)
    assert norms == pytest.approx(reference(False)[1], rel=5e-4)


def test_recomputation_gives_the_same_gradients():
    """To the last bit, with attention dropout: the random streams go back too."""
    for differences in run_ranks(2, recompute, timeout=300.0):
        assert set(differences.values()) == {0.0}, differences


@pytest.mark.parametrize("accumulate", [1, 3])
def test_dense_steps_are_steps_of_the_optimizer(accumulate):
    """Not passes, nor recomputed ones; evaluation runs as the step before it."""
    seen = run_ranks(2, count_steps_of, accumulate, timeout=300.0)[0]
    assert seen == [(False, False), (False, False), (True, True), (True, True)]


def test_another_model_than_megatrons_is_refused():
    groups, fields, dtype, loro, steps = run_ranks(2, provider_refusals, timeout=300.0)[0]
    assert "parallel.pipeline=1 (groups: 2)" in groups
    for part in ("num_layers=4 (Megatron: 2)", "ffn_hidden_size=128 (Megatron: 64)", "attention_dropout=0.0"):
        assert part in fields
    assert "elas_builder" in fields and "\n" not in fields
    assert "params_dtype=torch.float32 (Megatron: torch.bfloat16)" in dtype
    assert loro.startswith("optimizer.kind='loro'") and "elas train" in loro
    assert "sparsity.dense_steps=3" in steps and "count_steps" in steps
