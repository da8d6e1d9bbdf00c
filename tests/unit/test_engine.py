"""What can be said of the engine in one process."""

import pytest
import torch


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_weight_that_is_no_finite_number_is_seen(one_rank, bad, dtype):
    from elas import accelerator

    accelerator.prepare()
    from elas.engine.engine import Engine

    engine = Engine.__new__(Engine)  # its optimizer is not needed
    engine.stage, engine.chunks = 1, [torch.nn.Linear(4, 4, dtype=dtype), torch.nn.Linear(4, 0, dtype=dtype)]
    assert engine.is_finite()
    with torch.no_grad():
        engine.chunks[0].weight[2, 3] = bad
    assert not engine.is_finite()
