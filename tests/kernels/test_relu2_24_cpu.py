"""The C++ kernel: every instruction set and both kinds of products against fp64, buffers filled with NaN before use."""

import dataclasses
import functools
import itertools
import logging
import math

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, exact_inputs, fp64_core, rms_ratio

from elas.errors import UserError
from elas.kernels.relu2_24 import Relu24Options, cpu, ffn_core, registry
from elas.kernels.relu2_24.plain import compressed

CPU = torch.device("cpu")
MEMORIES = ("fused", "compressed")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""As in test_relu2_24_core; exact z leaves the roundings of sums (fp32) and of s, dz and results (bf16)."""
SHAPES = ((30, 8, 60, 6), (1, 8, 20, 8), (67, 7, 100, 9), (9, 1, 4, 3), (33, 1024, 40, 64), (33, 64, 40, 1000))
"""n, r_in, f, r_out: odd tokens, one token, odd widths (which bf16 matrix instructions do not take), few and many."""
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)
every_memory = pytest.mark.parametrize("memory", MEMORIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))

IMPLEMENTATION = next(one for one in registry.implementations("fused") if one.name == "cpu")
if registry.obstacle(IMPLEMENTATION, Relu24Options(), CPU, torch.float32):
    pytest.skip("no C++ compiler here", allow_module_level=True)


@pytest.fixture(params=("avx512-brgemm", "avx512", "avx2", "scalar"))
def machine(request):
    """Run as on a lesser machine; skipped where this one is lesser still."""
    isa, _, products = request.param.partition("-")
    try:
        if not cpu.operators().configure(isa, bool(products), True):
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    finally:
        cpu.operators().configure("auto", True, False)


@pytest.fixture
def poisoned():
    """As this machine chooses, with NaN in fresh buffers."""
    cpu.operators().configure("auto", True, True)
    yield
    cpu.operators().configure("auto", True, False)


def run(args, options, memory, implementation="cpu"):
    """v and the three gradients."""
    v = ffn_core(*args[:3], dataclasses.replace(options, ffn_memory=memory), implementation)
    return dict(zip(("v", "du", "dm_up", "dn_down"), (v.detach(), *torch.autograd.grad(v, args[:3], args[3]))))


@functools.cache
def inputs_and_truth(shape, dtype, options):
    """Operands and their fp64 results, shared by the tests of every machine."""
    args = exact_inputs(*shape, dtype)
    return args, fp64_core(*args, options)


@every_dtype
@every_memory
@every_case
def test_forward_and_every_gradient_agree_with_fp64(options, memory, dtype, machine):
    for shape in SHAPES:
        args, truth = inputs_and_truth(shape, dtype, options)
        for name, got in run(args, options, memory).items():
            assert got.dtype == dtype
            assert rms_ratio(got, truth[name]) < TOLERANCE[dtype], (shape, name)


@every_dtype
@every_memory
@pytest.mark.parametrize("options", [CASES[i] for i in (0, 1, 2, 5)], ids=case_name)
def test_tokens_and_features_beyond_a_tile(options, memory, dtype, poisoned):
    """Tiles are 512 × 512: two of tokens and three of features, each with a short last one."""
    args, truth = inputs_and_truth((525, 16, 1044, 24), dtype, options)
    for name, got in run(args, options, memory).items():
        assert rms_ratio(got, truth[name]) < TOLERANCE[dtype], name


def test_dense_takes_any_number_of_features(machine):
    options = Relu24Options(sparse=False)
    for dtype, memory, f in itertools.product(DTYPES, MEMORIES, (1, 2, 7, 18)):
        args, truth = inputs_and_truth((5, 8, f, 6), dtype, options)
        for name, got in run(args, options, memory).items():
            assert rms_ratio(got, truth[name]) < TOLERANCE[dtype], (dtype, memory, f, name)


@every_dtype
@every_case
def test_what_is_kept_is_what_plain_pytorch_keeps(options, dtype, machine):
    """Values and codes bit by bit, f with an odd number of groups; soft-threshold values within their roundings."""
    for f in (20, 44, 64):
        u, m_up, n_down, _ = exact_inputs(9, 8, f, 6, dtype)
        with torch.no_grad():
            _, want = compressed.compress(u @ m_up.T, options)
            _, *got = cpu.operators().forward(u, m_up, n_down, cpu.mode_of(options), options.scale, True)
        assert [x.dtype for x in got] == [x.dtype for x in want]
        assert [x.shape for x in got] == [x.shape for x in want]
        assert torch.equal(got[-1], want[-1])
        if len(got) == 2:
            exact = options.method == "magnitude"
            torch.testing.assert_close(got[0], want[0], rtol=0 if exact else 2**-6, atol=0)


SPECIAL = (-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan, math.copysign(math.nan, -1.0))


@every_dtype
@every_memory
@every_case
def test_groups_of_special_values_come_out_as_in_the_reference(options, memory, dtype, machine):
    """All 8⁴ groups as the z of one token, by m_up [f, 2] = (z, 0) and u = (1, 0).

    Of one token, dn_down is s and dm_up is dz times a factor. A third NaN or infinity in its group is dropped, and its
    gradient is the implementation's (reference: 0 · NaN); v and du are NaN throughout.
    """
    z = torch.tensor(list(itertools.product(SPECIAL, repeat=4)))
    if options.sparse:
        z = z[(z.isnan() | (z == math.inf)).sum(-1) <= 2]
    m_up = torch.stack([z.flatten(), torch.zeros(z.numel())], -1).to(dtype).requires_grad_()
    u = torch.tensor([[1.0, 0.0]], dtype=dtype).requires_grad_()
    n_down = torch.ones(2, z.numel(), dtype=dtype).requires_grad_()
    args = u, m_up, n_down, torch.tensor([[2.0, -0.5]], dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in args]  # in bf16 some machines' products make NaN of infinity
    got, want = run(args, options, memory), run(wide, options, "eager", "reference")
    assert got["v"].isnan().all()
    assert got["du"].isnan().any()
    # 2⁻⁶: two roundings of bf16 more or less in a soft threshold with a scale.
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 2**-6, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(got["dn_down"].float(), want["dn_down"], **tolerance)
    torch.testing.assert_close(got["dm_up"][:, 0].float(), want["dm_up"][:, 0], **tolerance)


@every_dtype
@every_memory
def test_infinite_gradients_stay_out_where_activations_are_zero(memory, dtype, machine):
    """As relu's derivative has it: 0 there, not 0 · ∞."""
    u, m_up, n_down, dv = exact_inputs(3, 2, 8, 2, dtype)
    with torch.no_grad():
        u.copy_(torch.tensor([1.0, 0.0]))
        m_up.copy_(torch.tensor([3.0, 2, 1, 0, -1, 0, 0, 4]).view(8, 1) * torch.tensor([1.0, 0.0]))
    dv = torch.full_like(dv, math.inf)
    with torch.no_grad():
        n_down.fill_(1)
    dm_up = run((u, m_up, n_down, dv), Relu24Options(), memory)["dm_up"][:, 0]
    assert dm_up.isinf().tolist() == [True, True, False, False, False, False, False, True]
    assert not dm_up[[2, 3, 4, 5, 6]].any()


@every_dtype
@every_memory
def test_strides_leading_shapes_and_no_tokens(memory, dtype, poisoned):
    u, m_up, n_down, dv = exact_inputs(12, 8, 20, 6, dtype)
    options = Relu24Options()
    want = run((u, m_up, n_down, dv), options, memory)
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (u, m_up, n_down)]
    assert not any(x.is_contiguous() for x in strided)
    got = run((*strided, dv[:1].expand(12, -1)), options, memory)
    assert torch.equal(got["v"], want["v"])
    got = run((u.detach().view(2, 3, 2, 8).requires_grad_(), m_up, n_down, dv.view(2, 3, 2, 6)), options, memory)
    for name, value in got.items():
        assert torch.equal(value.flatten(), want[name].flatten())
    got = run((u.detach()[:0].requires_grad_(), m_up, n_down, dv[:0]), options, memory)
    assert got["v"].shape == (0, 6)
    assert not got["dm_up"].any()
    assert not got["dn_down"].any()


@every_dtype
@every_memory
def test_a_gradient_nobody_wants_is_skipped_and_the_others_stay(memory, dtype, machine):
    *leaves, dv = exact_inputs(40, 8, 60, 6, dtype)
    full = list(run((*leaves, dv), Relu24Options(), memory).values())[1:]
    for wanted in itertools.product((False, True), repeat=3):
        args = [leaf.detach().clone().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
        v = ffn_core(*args, Relu24Options(ffn_memory=memory), "cpu")
        if any(wanted):
            v.backward(dv)
        for arg, want, grad in zip(args, wanted, full, strict=True):
            assert torch.equal(arg.grad, grad) if want else arg.grad is None


@every_dtype
@every_memory
def test_two_runs_are_bit_identical_with_and_without_gradients(memory, dtype, poisoned):
    args = exact_inputs(600, 16, 1100, 24, dtype)
    first, second = (run(args, Relu24Options(), memory) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
    with torch.no_grad():
        assert torch.equal(ffn_core(*args[:3], Relu24Options(ffn_memory=memory), "cpu"), first["v"])


@every_dtype
def test_few_tokens_without_gradients_are_plain_products(dtype):
    args = exact_inputs(3, 16, 100, 24, dtype)
    with_gradients = run(args, Relu24Options(), "fused")["v"]
    with torch.no_grad():
        alone = ffn_core(*args[:3], Relu24Options(), "cpu")
    assert rms_ratio(alone, with_gradients) < TOLERANCE[dtype]


def test_one_thread_and_two_agree(poisoned):
    args, truth = inputs_and_truth((525, 16, 1044, 24), torch.float32, Relu24Options())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, got in run(args, Relu24Options(), "fused").items():
                assert rms_ratio(got, truth[name]) < 1e-6, (count, name)
    finally:
        torch.set_num_threads(threads)


def test_it_is_chosen_in_fp32_and_bf16_and_names_what_it_refuses():
    for memory in MEMORIES:
        options = Relu24Options(ffn_memory=memory)
        assert [registry.select(options, CPU, dtype).name for dtype in DTYPES] == ["cpu", "cpu"]
        assert registry.select(options, CPU, torch.float64).name == "torch"
        with pytest.raises(UserError, match="supports float32 and bfloat16"):
            registry.select(options, CPU, torch.float64, "cpu")


def test_it_is_built_once(capfd):
    assert cpu.prebuild() == 0
    assert capfd.readouterr().err == ""


def test_without_a_compiler_plain_pytorch_runs_and_warns_once(monkeypatch, caplog):
    def operators():
        raise UserError("no C++ compiler (c++); install g++ or set CXX")

    monkeypatch.setattr(cpu, "operators", operators)

    def forget():
        cpu.build_obstacle.cache_clear()
        for memory in MEMORIES:
            registry.register(registry.unregister("cpu", memory))

    forget()
    try:
        with caplog.at_level(logging.WARNING, "elas.kernels"):
            for memory, dtype in itertools.product(MEMORIES, DTYPES):
                options = Relu24Options(ffn_memory=memory)
                for _ in range(2):
                    assert registry.select(options, CPU, dtype).name == "torch"
                with pytest.raises(UserError, match=r"^implementation='cpu': not available: no C\+\+ compiler"):
                    registry.select(options, CPU, dtype, "cpu")
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == len(set(lines)) == len(MEMORIES) * len(DTYPES)
        assert all(": torch (auto passed over triton: " in line and "cpu: no C++ compiler" in line for line in lines)
    finally:
        forget()
