"""Under autocast the layers do what `F.linear` does: operands are cast, gradients come back in the weights' dtype."""

import pytest
import torch

from elas.errors import UserError
from elas.kernels.relu2_24 import Relu24Options, ffn_core, relu2_24
from elas.nn import LowRankFFN, SparseFFN

pytestmark = pytest.mark.any_device

MEMORIES = ("fused", "compressed", "eager")
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def grads(ffn, x):
    y = ffn(x)
    return y, torch.autograd.grad(y.float().square().sum(), list(ffn.parameters()))


@every_memory
@pytest.mark.parametrize(
    "make", (lambda **m: LowRankFFN(32, 64, 8, bias=True, **m), lambda **m: SparseFFN(32, 64, **m))
)
def test_autocast_equals_weights_in_bf16(memory, make):
    """To the last bit: the same products of the same bf16 numbers. Weight gradients arrive in fp32."""
    torch.manual_seed(0)
    ffn = make(options=Relu24Options(ffn_memory=memory))
    x = torch.randn(3, 5, 32)
    twin = make(options=Relu24Options(ffn_memory=memory), dtype=torch.bfloat16)
    twin.load_state_dict(ffn.state_dict())
    want, want_grads = grads(twin, x.bfloat16())
    with torch.autocast(x.device.type, torch.bfloat16):
        got, got_grads = grads(ffn, x)  # the backward pass inside the region as well
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


@every_memory
def test_autocast_off_inside_is_fp32(memory):
    """In the backward pass too, which stands inside the outer region."""
    torch.manual_seed(0)
    ffn = LowRankFFN(32, 64, 8, options=Relu24Options(ffn_memory=memory))
    core = [torch.randn(shape).requires_grad_() for shape in ((5, 8), (64, 8), (6, 64))]
    x = torch.randn(5, 32)
    want = ffn(x)
    truth = torch.autograd.grad(ffn_core(*core, ffn.options).sum(), core)
    with torch.autocast(x.device.type, torch.bfloat16):
        with torch.autocast(x.device.type, enabled=False):
            assert torch.equal(ffn(x), want)
            v = ffn_core(*core, ffn.options)
        got = torch.autograd.grad(v.sum(), core)
    if memory != "eager":  # torch's own products follow the autocast around `backward()`
        for one, other in zip(got, truth, strict=True):
            assert torch.equal(one, other)


@every_memory
def test_autocast_leaves_fp64_and_refuses_fp16(memory):
    options = Relu24Options(ffn_memory=memory)
    ffn = LowRankFFN(32, 64, 8, options=options, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64)
    want = ffn(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(ffn(x), want)
        z = torch.randn(3, 8, dtype=torch.bfloat16)
        assert relu2_24(z, options).dtype == torch.bfloat16
    with (
        torch.autocast(x.device.type, torch.float16),
        pytest.raises(UserError, match=r"autocast in float16.*bf16=True"),
    ):
        LowRankFFN(32, 64, 8, options=options)(x.float())


@every_memory
def test_autocast_compiles_whole(memory):
    torch._dynamo.reset()
    ffn = LowRankFFN(32, 64, 8, bias=True, options=Relu24Options(ffn_memory=memory))
    x = torch.randn(5, 32)
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        want, want_grads = grads(ffn, x)
        got, got_grads = grads(compiled, x)
    for one, other in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)  # bf16; sums of tokens may be in another order
