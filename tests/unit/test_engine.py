"""The engine's parts that one process can test."""

import pytest
import torch


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_weight_that_is_no_finite_number_is_seen(one_rank, bad, dtype):
    from elas import accelerator

    accelerator.prepare()
    from elas.engine.grads import all_finite

    weights = [torch.randn(4, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype), torch.randn(4, dtype=dtype)]
    assert all_finite(weights)
    weights[0][2, 3] = bad
    assert not all_finite(weights)
