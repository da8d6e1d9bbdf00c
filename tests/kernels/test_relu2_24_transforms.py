"""The operation under torch.func, batched gradients, forward mode and torch.export: right, or refused."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from elas.kernels.relu2_24 import Relu24Options, ffn_core, relu2_24
from elas.nn import LowRankFFN

pytestmark = pytest.mark.any_device

CLOSE = dict(rtol=1e-10, atol=1e-10)  # fp64, sums in another order
DOUBLE = dict(dtype=torch.float64)
OPTIONS = {
    "fused": Relu24Options(),
    "fused dense": Relu24Options(sparse=False),
    "compressed": Relu24Options(ffn_memory="compressed"),
    "compressed soft threshold": Relu24Options(ffn_memory="compressed", method="soft_threshold", scale=1.3),
    "compressed ste": Relu24Options(ffn_memory="compressed", gradient="ste"),
    "split": Relu24Options(ffn_memory="eager", backward="split"),
    "eager": Relu24Options(ffn_memory="eager"),
    "eager ste": Relu24Options(ffn_memory="eager", gradient="ste"),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
ONE_PASS = [name for name in OPTIONS if name != "eager"]
first_only = pytest.mark.parametrize("options", [OPTIONS[name] for name in ONE_PASS], ids=ONE_PASS)


def core_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, **DOUBLE) for shape in ((3, 5, 4), (16, 4), (6, 16))]


def close(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@every_option
def test_func_grad_vmap_and_jacrev_equal_autograd(options):
    u, m, n = core_inputs()
    split = options.backward == "split"  # prunes along the tokens of a call, so samples alone are another function

    def loss(u, m, n):
        return ffn_core(u, m, n, options).square().sum()

    def autograd(u, m, n):
        leaves = [x.clone().requires_grad_() for x in (u, m, n)]
        return torch.autograd.grad(loss(*leaves), leaves)

    every = grad(loss, (0, 1, 2))
    close(every(u, m, n), autograd(u, m, n))
    singly = [torch.stack(each) for each in zip(*(autograd(one, m, n) for one in u))]
    close(vmap(every, (0, None, None))(u, m, n), singly)
    du = vmap(grad(loss), (1, None, None), 1)(u, m, n)  # a batch that is not the first dimension, and one product less
    torch.testing.assert_close(du, torch.stack([autograd(one, m, n)[0] for one in u.unbind(1)], 1), **CLOSE)
    if not split:
        close(grad(lambda *x: vmap(loss, (0, None, None))(*x).sum(), (0, 1, 2))(u, m, n), autograd(u, m, n))
    factors = torch.stack([m, 2 * m]), torch.stack([n, -n])
    each = [torch.stack(x) for x in zip(autograd(u, m, n), autograd(u, 2 * m, -n))]
    close(vmap(every, (None, 0, 0))(u, *factors), each)
    with torch.no_grad():
        close(vmap(ffn_core, (0, None, None, None))(u, m, n, options), ffn_core(u, m, n, options))


@every_option
def test_batched_gradients_equal_one_by_one(options):
    u, m, n = (x.requires_grad_() for x in core_inputs())
    if options.backward == "split" and u.is_cuda:
        pytest.skip("vmap allows no random order in autograd's thread of a GPU")
    v = ffn_core(u, m, n, options)
    dv = torch.randn(3, *v.shape, **DOUBLE)
    got = torch.autograd.grad(v, (u, m, n), dv, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(v, (u, m, n), one, retain_graph=True) for one in dv]
    close(got, [torch.stack(each) for each in zip(*singly)])
    row = u.detach()[0, 0]
    jacobian = jacrev(lambda u: ffn_core(u, m.detach(), n.detach(), options))(row)
    close([torch.autograd.functional.jacobian(lambda u: ffn_core(u, m, n, options), row)], [jacobian])


@pytest.mark.parametrize("options", [one for name, one in OPTIONS.items() if name != "split"])
def test_the_activation_alone_under_func(options):
    z = torch.randn(3, 8, **DOUBLE)
    leaf = z.clone().requires_grad_()
    want = torch.autograd.grad(relu2_24(leaf, options).square().sum(), leaf)

    def loss(z):
        return relu2_24(z, options).square().sum()

    close([grad(loss)(z)], want)
    close([vmap(grad(loss))(z)], want)
    close([grad(lambda z: vmap(loss)(z).sum())(z)], want)


@first_only
def test_second_derivatives_and_forward_mode_are_refused(options):
    u, m, n = core_inputs()
    leaf = u[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda u: ffn_core(u, m, n, options), (leaf,))
    with pytest.raises(RuntimeError, match="no second derivative"):
        jacrev(jacrev(lambda u: ffn_core(u, m, n, options).sum()))(u[0])
    core = lambda u: ffn_core(u, m, n, options)  # noqa: E731
    for differentiate in (lambda: jvp(core, (u,), (u,)), lambda: hessian(lambda u: core(u).sum())(u[0, 0])):
        with pytest.raises(NotImplementedError, match=r"^relu2_24 has no forward mode .*: use ffn_memory eager"):
            differentiate()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"^relu2_24 has no forward mode"),
    ):
        core(torch.autograd.forward_ad.make_dual(u, u))
    if options.backward == "split":
        return
    z = torch.randn(8, **DOUBLE)
    if options.sparse or options.ffn_memory != "eager":
        with pytest.raises(RuntimeError, match="no second derivative"):
            jacrev(jacrev(lambda z: relu2_24(z, options).sum()))(z)
        (dz,) = torch.autograd.grad(relu2_24(z.requires_grad_(), options).sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(dz.sum(), z)


def test_eager_has_second_derivatives_and_forward_mode():
    u, m, n = core_inputs()
    options = OPTIONS["eager"]
    assert torch.autograd.gradgradcheck(lambda u: ffn_core(u, m, n, options), (u[0].clone().requires_grad_(),))
    _, tangent = jvp(lambda u: ffn_core(u, m, n, options), (u,), (u,))
    torch.testing.assert_close(tangent, 2 * ffn_core(u, m, n, options), **CLOSE)  # homogeneous of degree 2 (Euler)


@pytest.mark.parametrize("memory", ("fused", "compressed", "eager"))
def test_compile_and_export_keep_the_number_of_tokens_open(memory):
    torch._dynamo.reset()
    ffn = LowRankFFN(8, 16, 4, bias=True, options=Relu24Options(ffn_memory=memory), **DOUBLE)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, backend=count, fullgraph=True, dynamic=True)
    inputs = [torch.randn(3, length, 8, **DOUBLE) for length in (5, 7, 9)]
    close([compiled(inputs[0])], [ffn(inputs[0])])
    first = count.frame_count
    close([compiled(x) for x in inputs], [ffn(x) for x in inputs])
    assert count.frame_count == first  # the second and third length compile nothing
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(ffn, (inputs[0],), dynamic_shapes=({1: tokens},)).module()
    close([exported(x) for x in inputs], [ffn(x) for x in inputs])
    params = dict(ffn.named_parameters())
    if memory != "eager":
        func = torch.compile(
            grad(lambda p, x: functional_call(ffn, p, (x,)).sum()), backend="aot_eager", fullgraph=True
        )
        with pytest.raises(Exception, match=r"torch\.func transforms of ffn_core"):
            func(params, inputs[0])


@pytest.mark.parametrize("memory", ("fused", "compressed", "eager"))
def test_both_kinds_of_checkpoint(memory):
    ffn = LowRankFFN(8, 16, 4, bias=True, options=Relu24Options(ffn_memory=memory), **DOUBLE)
    x = torch.randn(3, 5, 8, **DOUBLE).requires_grad_()
    want = torch.autograd.grad(ffn(x).square().sum(), [x, *ffn.parameters()])
    got = torch.autograd.grad(checkpoint(ffn, x, use_reentrant=False).square().sum(), [x, *ffn.parameters()])
    close(got, want)
    twin = copy.deepcopy(ffn)
    checkpoint(twin, x, use_reentrant=True).square().sum().backward()
    close([x.grad, *(p.grad for p in twin.parameters())], want)
