"""The core in chunks of plain PyTorch, and as one operator under torch.compile."""

import dataclasses

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, exact_inputs, fp64_core, rms_ratio

from elas import accelerator
from elas.kernels.relu2_24 import Relu24Options, ffn_core
from elas.kernels.relu2_24.plain import fused

pytestmark = pytest.mark.any_device

every_case = pytest.mark.parametrize("options", CASES, ids=case_name)


@pytest.fixture
def chunks_of_seven(monkeypatch):
    """Seven tokens a chunk, so that 30 tokens are five chunks and the last is short."""
    monkeypatch.setattr(fused, "chunk_tokens", lambda features, device: 7)


# fp32 and bf16 as in test_relu2_24_core; fp64 rounds at 1e-16 and sums 60 terms.
@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)))
@every_case
def test_chunks_add_up_to_the_whole(options, dtype, tolerance, chunks_of_seven):
    args = exact_inputs(30, 8, 60, 6, dtype)
    v = ffn_core(*args[:3], options, "torch")
    got = (v.detach(), *torch.autograd.grad(v, args[:3], args[3]))
    for (name, want), value in zip(fp64_core(*args, options).items(), got, strict=True):
        assert value.dtype == dtype
        assert rms_ratio(value, want) < tolerance, name


def test_weight_gradients_of_bf16_are_summed_over_chunks_in_fp32(monkeypatch):
    """A hundred chunks: off by 3e-3 (ds, dz, a chunk's part and the sum are rounded), 1e-2 with sums in bf16."""
    monkeypatch.setattr(fused, "chunk_tokens", lambda features, device: 4)
    args = exact_inputs(400, 8, 60, 6, torch.bfloat16)
    v = ffn_core(*args[:3], Relu24Options(), "torch")
    _, dm_up, dn_down = torch.autograd.grad(v, args[:3], args[3])
    truth = fp64_core(*args, Relu24Options())
    assert rms_ratio(dm_up, truth["dm_up"]) < 4e-3
    assert rms_ratio(dn_down, truth["dn_down"]) < 4e-3


def test_gradients_through_chunks_are_the_derivatives(chunks_of_seven):
    options = Relu24Options(method="soft_threshold", scale=1.3)
    generator = torch.Generator().manual_seed(1)
    shapes = ((9, 3), (12, 3), (2, 12))
    args = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    z = (args[0] @ args[1].T).detach().relu().view(-1, 4).sort(-1, descending=True).values
    assert (z[:, :-1] - z[:, 1:])[z[:, :-1] > 0].min() > 1e-4  # gradcheck steps by 1e-6: no tie within its reach
    assert torch.autograd.gradcheck(lambda *a: ffn_core(*a, options), args)


@pytest.mark.parametrize("memory", ("eager", "compressed", "fused"))
@every_case
def test_torch_compile_takes_it_whole(options, memory):
    """`fullgraph=True` raises at the first break; tolerances of fp32 sums in another order.

    On a machine without CUDA this is under the torch-function mode that training runs under.
    """
    accelerator.prepare()
    options = dataclasses.replace(options, ffn_memory=memory)
    u, m_up, n_down, _ = exact_inputs(33, 8, 20, 6, torch.float32)

    def loss(u, m_up, n_down):
        return (2 * ffn_core(1.5 * u.view(3, 11, 8), m_up, n_down, options)).square().sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(u, m_up, n_down), (u, m_up, n_down))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(u, m_up, n_down), (u, m_up, n_down))
    for one, other in zip(got, want, strict=True):
        assert rms_ratio(one, other) < 1e-6
    with torch.no_grad():
        assert rms_ratio(compiled(u, m_up, n_down), loss(u, m_up, n_down)) < 1e-6


@pytest.mark.parametrize("memory", ("compressed", "fused"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@every_case
def test_the_operator_keeps_torchs_rules(options, dtype, memory):
    """`opcheck`: schema, fake implementation and autograd registration agree with what the operator does."""
    u, m_up, n_down, _ = exact_inputs(5, 8, 20, 6, dtype)
    how = options.sparse, options.method, options.gradient, options.scale, memory, "dense", "auto"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.elas.relu2_24_core, (u, m_up, n_down, 1, *how), test_utils=tests)
