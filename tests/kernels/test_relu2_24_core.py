"""The core between two products: every implementation against fp64, and the bytes it keeps."""

import dataclasses
import itertools

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, fp64_core, rms_ratio, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from elas.errors import ConfigError, UserError
from elas.kernels.relu2_24 import Relu24Options, ffn_core, implementations, registry, relu2_24

pytestmark = pytest.mark.any_device

MEMORIES = ("eager", "compressed", "fused")
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)
every_memory = pytest.mark.parametrize("memory", MEMORIES)

FP32_TOLERANCE = 1e-6
"""fp32 rounds at 6e-8; sums of 16 to 60 terms and three products in a row keep the RMS below ten times that."""
BF16_TOLERANCE = 6e-3
"""bf16 rounds at 2e-3 RMS 1.1e-3; s, ds, dz and the result are rounded, s and dz twice its relative error."""


def inputs(lead=(3, 10), r_in=8, f=60, r_out=6, dtype=torch.float64, seed=0):
    """u, m_up, n_down (leaves that want gradients) and dv."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*lead, r_in), (f, r_in), (r_out, f), (*lead, r_out))
    u, m_up, n_down, dv = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return u.requires_grad_(), m_up.requires_grad_(), n_down.requires_grad_(), dv


def run(u, m_up, n_down, dv, options, implementation="auto"):
    """v and every gradient by name."""
    v = ffn_core(u, m_up, n_down, options, implementation)
    grads = torch.autograd.grad(v, (u, m_up, n_down), dv)
    return dict(zip(("v", "du", "dm_up", "dn_down"), (v.detach(), *grads), strict=True))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)))
@every_case
def test_forward_and_gradients_agree_with_fp64_and_each_other(options, dtype, tolerance):
    args = inputs(dtype=dtype)
    widths = registry.Widths.of(*args[1:3])
    truth = fp64_core(*args, options)
    results = {}
    for memory in MEMORIES:
        for one in implementations(memory):
            if registry.obstacle(one, options, args[0].device, dtype, widths) is not None:
                continue  # made for other machines
            got = run(*args, dataclasses.replace(options, ffn_memory=memory), one.name)
            for name, want in truth.items():
                assert got[name].dtype == dtype
                assert got[name].shape == want.shape
                assert rms_ratio(got[name], want) < tolerance, (memory, one.name, name)
            results[memory] = got
    for name, memory in itertools.product(truth, ("compressed", "fused")):
        assert rms_ratio(results[memory][name], results["eager"][name]) < tolerance, (memory, name)


@every_memory
@every_case
def test_every_gradient_is_the_derivative(options, memory):
    if options.sparse and options.gradient == "ste":
        options = dataclasses.replace(options, gradient="masked")
    u, m_up, n_down, _ = inputs(lead=(5,), r_in=3, f=12, r_out=2, seed=1)
    z = (u @ m_up.T).detach()
    ranked = z.relu().view(-1, 4).sort(-1, descending=True).values
    apart = (ranked[:, :-1] - ranked[:, 1:])[ranked[:, :-1] > 0].min()
    assert z.abs().min() > 1e-3  # gradcheck steps by 1e-6: no kink, no tie within its reach
    assert apart > 1e-3
    options = dataclasses.replace(options, ffn_memory=memory)
    assert torch.autograd.gradcheck(lambda *args: ffn_core(*args, options), (u, m_up, n_down))


@every_memory
@every_case
@pytest.mark.parametrize("lead", ((), (0,), (1,), (2, 0, 3), (1, 1), (2, 3, 4)))
def test_any_leading_shape(options, memory, lead):
    args = inputs(lead=lead, f=20)
    got = run(*args, dataclasses.replace(options, ffn_memory=memory))
    if 0 in lead:
        assert got["v"].shape == (*lead, 6)
        assert got["du"].shape == (*lead, 8)
        assert not got["dm_up"].any()
        assert not got["dn_down"].any()
        return
    for name, want in fp64_core(*args, options).items():
        assert got[name].shape == want.shape
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)  # fp64 on both sides


@every_memory
@every_case
def test_strides_do_not_matter(options, memory):
    u, m_up, n_down, dv = inputs()
    options = dataclasses.replace(options, ffn_memory=memory)
    want = run(u, m_up, n_down, dv, options)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in (u, m_up, n_down)]
    assert not any(x.is_contiguous() for x in strided)
    got = run(*(x.requires_grad_() for x in strided), dv.transpose(0, 1).contiguous().transpose(0, 1), options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)  # sums in another order
    assert torch.equal(strided[0], u)  # and the inputs are as they were


@every_memory
@every_case
def test_a_gradient_nobody_wants_is_skipped_and_the_others_stay(options, memory):
    *leaves, dv = inputs()
    options = dataclasses.replace(options, ffn_memory=memory)
    full = list(run(*leaves, dv, options).values())[1:]
    for wanted in itertools.product((False, True), repeat=3):
        args = [leaf.detach().clone().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
        v = ffn_core(*args, options)
        assert v.requires_grad == any(wanted)
        if any(wanted):
            v.backward(dv)
        for arg, want, grad in zip(args, wanted, full, strict=True):
            assert torch.equal(arg.grad, grad) if want else arg.grad is None


@pytest.mark.parametrize(
    "wanted, r_in_products, r_out_products",
    (((1, 0, 0), 1, 1), ((0, 1, 0), 1, 1), ((0, 0, 1), 0, 1), ((1, 1, 1), 2, 2)),
)
@pytest.mark.parametrize("memory", ("eager", "compressed"))
def test_only_the_products_of_wanted_gradients_are_computed(memory, wanted, r_in_products, r_out_products):
    """Counted in FLOPs: a product with the r_in side is 2·30·60·8, one with the r_out side 2·30·60·6.

    The counter does not see products into given buffers, so not the fused form.
    """
    *leaves, dv = inputs()
    args = [leaf.detach().requires_grad_(bool(want)) for leaf, want in zip(leaves, wanted, strict=True)]
    v = ffn_core(*args, Relu24Options(ffn_memory=memory), "auto" if memory == "eager" else "torch")
    with FlopCounterMode(display=False) as counter:
        v.backward(dv)
    assert counter.get_total_flops() == 2 * 30 * 60 * (8 * r_in_products + 6 * r_out_products)


KEPT = {
    # × one bf16 activation [n, f]: eager, compressed and fused core, eager, compressed and fused alone
    "dense": (2.0, 1.0, 0.0, 1.0, 1.0, 1.0),
    "magnitude-masked-1.0": (2.5, 0.5625, 0.0, 1.5, 0.5625, 0.5625),
    "magnitude-ste-1.0": (2.0, 1.0, 0.0, 1.0, 1.0, 1.0),
    "soft_threshold-masked-1.0": (4.0, 0.625, 0.0, 3.0, 0.625, 0.625),
    "soft_threshold-masked-1.3": (4.0, 0.625, 0.0, 3.0, 0.625, 0.625),
    "soft_threshold-ste-1.0": (2.0, 1.0, 0.0, 1.0, 1.0, 1.0),
}


@every_case
def test_bytes_kept_for_the_backward_pass(options):
    u, m_up, n_down, _ = inputs(f=64, dtype=torch.bfloat16)
    dense = 2 * 30 * 64
    z = (u @ m_up.T).detach().requires_grad_()
    got = []
    for run_one, args in ((ffn_core, (u, m_up, n_down)), (relu2_24, (z,))):
        for memory in MEMORIES:
            one = dataclasses.replace(options, ffn_memory=memory)
            got.append(saved_bytes(lambda f=run_one, a=args, o=one: f(*a, o), args) / dense)
    assert tuple(got) == KEPT[case_name(options)]


def test_an_odd_number_of_groups_costs_half_a_byte_a_token():
    u, m_up, n_down, _ = inputs(f=20, dtype=torch.bfloat16)
    options = Relu24Options(ffn_memory="compressed")
    assert saved_bytes(lambda: ffn_core(u, m_up, n_down, options), (u, m_up, n_down)) == 30 * (2 * 10 + 3)


def test_without_gradients_nothing_is_packed_values_are_equal(monkeypatch):
    u, m_up, n_down, _ = inputs()
    options = Relu24Options(ffn_memory="compressed")
    with_grad = ffn_core(u, m_up, n_down, options, "torch")
    monkeypatch.setattr("elas.kernels.relu2_24.pack.take", None)
    with torch.no_grad():
        assert torch.equal(ffn_core(u, m_up, n_down, options, "torch"), with_grad)


@pytest.mark.parametrize("memory", ("compressed", "fused"))
def test_a_second_derivative_is_refused(memory):
    u, m_up, n_down, _ = inputs()
    v = ffn_core(u, m_up, n_down, Relu24Options(ffn_memory=memory))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(v.sum(), u, create_graph=True)


@every_memory
def test_factors_that_do_not_fit_are_refused_in_one_line(memory):
    options = Relu24Options(ffn_memory=memory)
    u, m_up, n_down, _ = inputs(lead=(3,))
    for args in ((u, m_up.T, n_down), (u, m_up, n_down.T), (u, m_up[0], n_down)):
        with pytest.raises(UserError, match=r"ffn_core takes u .*m_up \["):
            ffn_core(*args, options)
    with pytest.raises(UserError, match="one dtype"):
        ffn_core(u, m_up.float(), n_down, options)
    with pytest.raises(UserError, match="float16"):
        ffn_core(u.half(), m_up.half(), n_down.half(), options)
    with pytest.raises(ConfigError, match=r"^features=58"):
        ffn_core(u, m_up[:58], n_down[:, :58], options)
    assert ffn_core(u, m_up[:58], n_down[:, :58], dataclasses.replace(options, sparse=False)).shape == (3, 6)
