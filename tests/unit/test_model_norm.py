"""RMSNorm equals its formula, and says whether its weight's gradient is a partial sum."""

from types import SimpleNamespace

import pytest
import torch

from elas.bench.measure import SavedBytes
from elas.model.norm import LeanRMSNorm, RMSNorm

H = 96


def norm(dtype=torch.float32, sequence: bool = False, eps: float = 1e-6) -> RMSNorm:
    layer = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence), H, eps)
    layer.weight.data.copy_(torch.linspace(0.5, 1.5, H))
    return layer


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) / H + eps).sqrt() * weight


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_equals_the_formula(dtype, tolerance, eps):
    """Against fp64, relative to the largest value: 96 terms at 6e-8 in fp32, a few roundings of 4e-3 in bf16."""
    layer = norm(dtype, eps=eps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, H, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(5, 2, H, generator=generator).to(dtype)
    y = layer(x)
    y.backward(upstream)

    wide, weight = (v.detach().double().requires_grad_() for v in (x, layer.weight))
    expected = formula(wide, weight, eps)
    expected.backward(upstream.double())
    assert y.dtype is dtype
    for value, wanted in ((y, expected), (x.grad, wide.grad), (layer.weight.grad, weight.grad)):
        assert (value.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_starts_as_ones_in_the_dtype_of_the_parameters():
    layer = RMSNorm(SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False), H)
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight, torch.ones(H, dtype=torch.bfloat16))


def test_marks_its_weight_under_sequence_parallelism():
    assert norm(sequence=True).weight.sequence_parallel is True
    assert norm(sequence=False).weight.sequence_parallel is False


def test_gradcheck():
    x = torch.randn(3, 4, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: LeanRMSNorm.apply(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_its_input_and_a_number_a_row(dtype):
    layer, x = norm(dtype), torch.randn(50, H).to(dtype).requires_grad_()
    saved = SavedBytes([x, layer.weight])
    with saved.hooks():
        layer(x)
    assert saved.total == 50 * 4


def test_it_agrees_with_torch():
    layer, x = norm(torch.bfloat16), torch.randn(50, H).bfloat16()
    expected = torch.nn.functional.rms_norm(x, (H,), layer.weight, layer.eps)
    assert (layer(x).float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max()
