"""Tests of what has no twin on a CPU: they run with `pytest --device cuda` alone."""

import pytest
import torch


@pytest.fixture(autouse=True)
def tensor_cores():
    """TF32 allowed, without which the Triton kernels refuse fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
