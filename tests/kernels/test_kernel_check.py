"""The formulas that kernels are held to on a GPU, against groups ranked one by one."""

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, fp64_core, rms_ratio

from elas.bench.kernel_check import operands, truth


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", CASES, ids=case_name)
def test_formulas_equal_those_of_the_oracle(options, dtype):
    """On inputs full of ties, whose z no order of summation changes."""
    inputs = operands(37, 24, 60, 20, dtype, torch.device("cpu"))
    want = fp64_core(*inputs, options)
    for name, got in truth(inputs, options).items():
        assert rms_ratio(got, want[name]) < 1e-14, name
