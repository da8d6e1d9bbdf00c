"""DTensor tensor parallelism and FSDP2 on two gloo ranks equal the plain layer, gradients too."""

import pytest
import sharded
from ranks import run_ranks

TOLERANCE = 1e-10
"""fp64, sums over ranks in another order."""


def test_tensor_parallel_equals_plain():
    for found in run_ranks(2, sharded.tensor_parallel, False, timeout=240):
        assert set(found) == set(sharded.KINDS)
        assert max(found.values()) < TOLERANCE, found


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
