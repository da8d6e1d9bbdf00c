"""RMSNorm equals its formula, and says whether its weight's gradient is a partial sum."""

from types import SimpleNamespace

import pytest
import torch

from elas.bench.measure import SavedBytes
from elas.errors import ConfigError
from elas.model.norm import LayerNorm, LeanRMSNorm, RMSNorm

H = 96


def config(kind: str = "RMSNorm", dtype=torch.float32, sequence: bool = False, zero_centred: bool = False):
    return SimpleNamespace(
        normalization=kind,
        params_dtype=dtype,
        sequence_parallel=sequence,
        layernorm_zero_centered_gamma=zero_centred,
        use_cpu_initialization=False,
    )


def norm(dtype=torch.float32, sequence: bool = False, eps: float = 1e-6) -> RMSNorm:
    layer = RMSNorm(config(dtype=dtype, sequence=sequence), H, eps)
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
    layer = RMSNorm(config(dtype=torch.bfloat16), H)
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight, torch.ones(H, dtype=torch.bfloat16))


def test_marks_its_weight_under_sequence_parallelism():
    assert norm(sequence=True).weight.sequence_parallel is True
    assert norm(sequence=False).weight.sequence_parallel is False


@pytest.mark.parametrize("zero_centred", [False, True])
def test_layer_norm_equals_the_formula(zero_centred):
    """Against fp64, 2e-6 of the largest value: 96 terms at 6e-8."""
    layer = LayerNorm(config("LayerNorm", sequence=True, zero_centred=zero_centred), H, 1e-3)
    start = layer(torch.eye(H)[:2])
    assert start.mean().abs() < 1e-6 and layer.bias.sequence_parallel
    layer.weight.data.copy_(torch.linspace(0.5, 1.5, H) - int(zero_centred))
    layer.bias.data.copy_(torch.linspace(-1, 1, H))
    x = torch.randn(5, 2, H, generator=torch.Generator().manual_seed(3)) + 2
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * torch.linspace(0.5, 1.5, H)
    assert (layer(x) - wanted - torch.linspace(-1, 1, H)).abs().max() < 2e-6 * 4


def test_zero_centred_weight_is_the_distance_from_one():
    plain, centred = norm(), RMSNorm(config(zero_centred=True), H)
    assert torch.equal(centred.weight, torch.zeros(H))
    centred.weight.data.copy_(plain.weight.data - 1)
    x = torch.randn(5, H)
    assert torch.allclose(centred(x), plain(x), atol=1e-6)
    centred(x).sum().backward()
    assert centred.weight.grad.abs().max() > 0


def test_another_norm_than_the_configured_is_refused():
    with pytest.raises(ConfigError, match="normalization='LayerNorm': the layer's spec has RMSNorm"):
        RMSNorm(config("LayerNorm"), H)


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
