"""DTensor tensor parallelism and FSDP2 on two gloo ranks equal the plain layer, gradients too."""

import pytest
import sharded
from support.ranks import run_ranks

TOLERANCE = 1e-10
"""fp64, sums over ranks in another order."""


def test_tensor_parallel_equals_plain():
    for found in run_ranks(2, sharded.tensor_parallel, False, timeout=240):
        assert set(sharded.KINDS) <= set(found)
        assert max(found.values()) < TOLERANCE, found


def test_groups_that_ranks_would_cut_are_refused():
    for fused, compressed, fits in run_ranks(2, sharded.cut_groups, timeout=240):
        assert fused == "ffn_hidden_size=20: 2 ranks require whole 2:4 groups; give a multiple of 8"
        assert compressed.startswith("ffn_hidden_size=24: 2 ranks require pairs of 2:4 groups")
        assert compressed.endswith("give a multiple of 16") and fits == "taken"


def test_tensor_parallel_compiles_whole():
    for found in run_ranks(2, sharded.tensor_parallel, True, timeout=240):
        assert max(found.values()) < TOLERANCE, found


def test_any_shards_of_tokens_or_features():
    for found, message in run_ranks(2, sharded.by_hand, timeout=240):
        assert len(found) == 2 * len(sharded.OPTIONS)
        assert max(found.values()) < TOLERANCE, found
        assert "20" in message
        assert "groups would straddle the 2 shards" in message


@pytest.mark.timeout(300)
def test_fsdp2_at_each_linear_equals_plain():
    for found in run_ranks(2, sharded.fully_sharded, timeout=240):
        assert max(found.values()) < TOLERANCE, found


def test_loro_refuses_shards_made_before_or_after_it():
    for said in run_ranks(2, sharded.loro_on_shards, timeout=240):
        assert len(said) == 4
        for message in said:
            assert message.startswith("model=") and "sharded" in message and "\n" not in message
