"""The element-wise operation: values, gradients, what is let through and what is refused."""

import dataclasses
import itertools
import math

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, fp64_step, rms_ratio, spread

from elas.errors import ConfigError, UserError
from elas.kernels.relu2_24 import Relu24Options, activation_stats, relu2_24

pytestmark = pytest.mark.any_device

MEMORIES = ("eager", "compressed")  # alone, fused is compressed
NEGATIVE_NAN = math.copysign(math.nan, -1.0)
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def value_and_gradient(z, ds, options, memory):
    """s and dz of the operation under one memory mode."""
    z = z.detach().clone().requires_grad_()
    s = relu2_24(z, dataclasses.replace(options, ffn_memory=memory))
    (dz,) = torch.autograd.grad(s, z, ds)
    return s.detach(), dz


def bits(x):
    """Bit patterns, so that -0.0 and 0.0 differ and NaN equals itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@every_memory
@every_case
def test_gradient_is_the_derivative(options, memory):
    """Holds for everything but ste, which is no derivative; inputs keep 0.025 away from kinks and ties."""
    if options.sparse and options.gradient == "ste":
        options = dataclasses.replace(options, gradient="masked")
    z = spread(3, 20, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relu2_24(x, dataclasses.replace(options, ffn_memory=memory)), z)


@every_memory
@every_case
def test_values_and_gradients_follow_the_written_formulas(options, memory):
    """fp64 against formulas over brute-force masks; 1e-14 leaves a few roundings of 1e-16, a root among them."""
    z = torch.cat([spread(6, 20, seed=2), torch.randint(-2, 4, (6, 20)).double()])  # the second half full of ties
    ds = torch.randn(z.shape, dtype=torch.float64)
    s, dz = value_and_gradient(z, ds, options, memory)
    want_s, want_dz = fp64_step(z, ds, options)
    assert rms_ratio(s, want_s) < 1e-14
    assert rms_ratio(dz, want_dz) < 1e-14


@every_memory
@pytest.mark.parametrize("method, factor", (("magnitude", 2.0), ("soft_threshold", 2.6)))
def test_ste_passes_the_unpruned_gradient_everywhere(method, factor, memory):
    z, ds = spread(4, 20, seed=3), torch.randn(4, 20, dtype=torch.float64)
    s, dz = value_and_gradient(z, ds, Relu24Options(method=method, gradient="ste", scale=1.3), memory)
    torch.testing.assert_close(dz, factor * z.clamp_min(0) * ds, rtol=1e-14, atol=0)
    dropped = (s == 0) & (z > 0)
    assert dropped.any()
    assert (dz[dropped] != 0).all()


def test_compressed_gradient_equals_eager_for_every_bf16():
    """All bf16 numbers of both signs with 1e-19 < |z| < 1.8e19, and 0, in random groups."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    magnitude = patterns.float().abs()
    z = patterns[(magnitude == 0) | ((magnitude > 1e-19) & (magnitude < 1.8e19))]
    generator = torch.Generator().manual_seed(4)
    z = z[torch.randperm(len(z), generator=generator)][: len(z) // 16 * 16].view(-1, 16)
    assert z.numel() > 30_000
    ds = torch.randn(z.shape, generator=generator).bfloat16()
    eager, compressed = (value_and_gradient(z, ds, Relu24Options(), m) for m in MEMORIES)
    assert torch.equal(bits(eager[0]), bits(compressed[0]))
    assert torch.equal(bits(eager[1]), bits(compressed[1]))


@every_case
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_compressed_is_bit_identical_to_eager_on_activations(options, dtype):
    """N(0, 1) inputs; a soft threshold with a scale is not, its root goes through a rounded product."""
    generator = torch.Generator().manual_seed(5)
    z, ds = (torch.randn(64, 128, generator=generator).to(dtype) for _ in range(2))
    eager, compressed = (value_and_gradient(z, ds, options, m) for m in MEMORIES)
    assert torch.equal(eager[0], compressed[0])
    if options.scale == 1.0 or not options.sparse:
        assert torch.equal(eager[1], compressed[1])
    else:
        # Two roundings at most of the root: 2 · 2⁻⁹ in bf16, 2 · 2⁻²⁴ in fp32; at the third they may add up.
        assert rms_ratio(compressed[1], eager[1]) < (8e-3 if dtype == torch.bfloat16 else 3e-7)


def test_compressed_gradient_is_within_1e_18_at_underflow():
    z = torch.logspace(-40, -18.5, 400).view(-1, 4)
    eager, compressed = (value_and_gradient(z, torch.ones_like(z), Relu24Options(), m)[1] for m in MEMORIES)
    assert (eager - compressed).abs().max() < 1e-18
    assert not torch.equal(eager, compressed)


@every_memory
@pytest.mark.parametrize("nan", (math.nan, NEGATIVE_NAN))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_nan_of_either_sign_stays_nan_in_value_and_gradient(nan, dtype, memory):
    for options in CASES:
        for place in range(4):
            z = torch.tensor([[3.0, 2.0, 4.0, 5.0, 1.0, -1.0, 2.0, 0.5]]).repeat(9, 1)  # 9 rows: vector code and tail
            z[:, place] = nan
            s, dz = value_and_gradient(z.to(dtype), torch.ones(9, 8, dtype=dtype), options, memory)
            assert s[:, place].isnan().all()
            assert dz[:, place].isnan().all()
            assert s[:, 4:].isfinite().all()


@every_memory
def test_infinities(memory):
    z = torch.tensor([[math.inf, -math.inf, 1.0, 2.0, -math.inf, -math.inf, -math.inf, -math.inf]])
    s, dz = value_and_gradient(z, torch.ones_like(z), Relu24Options(), memory)
    assert s.tolist() == [[math.inf, 0, 0, 4, 0, 0, 0, 0]]
    assert dz.tolist() == [[math.inf, 0, 0, 4, 0, 0, 0, 0]]


@every_case
def test_compressed_equals_eager_with_ties_zeros_and_nan(options):
    """1e-6: fp32 roundings of a scaled root; everything else is equal.

    A third NaN in a group is dropped; eager magnitude gives it the gradient 0 · NaN, compressed 0. Not compared.
    """
    values = (-math.inf, -1.0, -0.0, 0.0, 1.0, 2.0, math.nan, NEGATIVE_NAN)
    z = torch.tensor(list(itertools.product(values, repeat=4)))
    if options.method == "magnitude":
        z = z[z.isnan().sum(-1) <= 2]
    ds = torch.tensor([1.0, 2.0, 4.0, 8.0]).expand_as(z)
    eager, compressed = (value_and_gradient(z, ds, options, m) for m in MEMORIES)
    for want, got in zip(eager, compressed, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)


@every_memory
def test_features_below_infinite_thresholds_get_no_gradient(memory):
    z = torch.tensor([[math.inf, math.inf, 1.0, math.inf]])
    s, dz = value_and_gradient(z, torch.ones_like(z), Relu24Options(method="soft_threshold"), memory)
    assert s[0, :2].isnan().all()  # ∞ − ∞
    assert dz[0, 2] == 0


@every_memory
def test_infinite_gradients_leave_inactive_features_finite(memory):
    z = torch.tensor([[-1.0, -2.0, 0.0, 3.0]])
    _, dz = value_and_gradient(z, torch.full_like(z, math.inf), Relu24Options(), memory)
    assert dz.tolist() == [[0, 0, 0, math.inf]]


@every_memory
@every_case
@pytest.mark.parametrize("shape", ((4,), (0, 8), (1, 12), (3, 0, 4), (2, 3, 5, 20)))
def test_any_leading_shape_and_strides(options, memory, shape):
    wide = torch.randn(*shape[:-1], 3 * shape[-1], generator=torch.Generator().manual_seed(6))
    ds = torch.ones(()).expand(shape)
    strided, plain = wide[..., ::3], wide[..., ::3].contiguous()
    leaf = wide.clone().requires_grad_()
    s = relu2_24(leaf[..., ::3], dataclasses.replace(options, ffn_memory=memory))
    s.backward(ds)
    want_s, want_dz = value_and_gradient(plain, ds, options, memory)
    assert s.shape == shape
    assert torch.equal(s, want_s)
    assert torch.equal(leaf.grad[..., ::3], want_dz)
    assert torch.equal(strided, leaf.detach()[..., ::3])  # the input is as it was


@every_memory
def test_dense_takes_any_number_of_features(memory):
    z = torch.randn(3, 7)
    s, dz = value_and_gradient(z, torch.ones_like(z), Relu24Options(sparse=False), memory)
    assert torch.equal(s, z.relu() ** 2)
    assert torch.equal(dz, 2 * z.relu())


@every_memory
@every_case
def test_a_second_derivative_is_right_or_refused(options, memory):
    z = spread(2, 8, seed=7).requires_grad_()
    options = dataclasses.replace(options, ffn_memory=memory)
    if memory == "compressed" or (options.sparse and options.gradient == "ste"):
        # A graph of the first alone is no error: `torch.func.grad` always builds one.
        (dz,) = torch.autograd.grad(relu2_24(z, options).sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(dz.sum(), z)
    else:
        assert torch.autograd.gradgradcheck(lambda x: relu2_24(x, options), z)


@every_memory
def test_float16_is_refused_for_its_range(memory):
    with pytest.raises(UserError, match=r"overflows above 256; use bfloat16"):
        relu2_24(torch.ones(2, 4, dtype=torch.float16), Relu24Options(ffn_memory=memory))
    with pytest.raises(UserError, match="int64"):
        relu2_24(torch.ones(2, 4, dtype=torch.int64), Relu24Options(ffn_memory=memory))


@every_memory
def test_features_not_divisible_by_four_are_refused_in_one_line(memory):
    with pytest.raises(ConfigError, match=r"^features=10: .*groups of 4; give a multiple of 4") as caught:
        relu2_24(torch.ones(2, 10), Relu24Options(ffn_memory=memory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    (
        ("sparse", "yes"),
        ("method", "topk"),
        ("gradient", "soft"),
        ("ffn_memory", "none"),
        ("scale", 0.0),
        ("scale", math.nan),
        ("scale", math.inf),
        ("scale", True),
        ("scale", "1"),
    ),
)
def test_a_wrong_option_is_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        Relu24Options(**{key: value})


@pytest.mark.parametrize("f", (4, 20, 21, 23, 3))
def test_activation_stats_count_what_pruning_drops(f):
    z = torch.randn(11, f, generator=torch.Generator().manual_seed(f)).add(0.5).bfloat16()
    z[0, :2] = torch.tensor([math.nan, 0.0])
    rows = [[not v <= 0 for v in row] for row in z.tolist()]
    nonzero = sum(map(sum, rows))
    dropped = sum(max(sum(row[i : i + 4]) - 2, 0) for row in rows for i in range(0, f, 4))
    got = activation_stats(z)
    assert [x.item() for x in got] == [11 * f - nonzero, nonzero, dropped]
    assert all(x.dtype == torch.int64 and x.dim() == 0 for x in got)
    assert dropped > 0 or f == 3


def test_activation_stats_agree_with_what_the_operation_zeroes():
    z = torch.randn(50, 40, generator=torch.Generator().manual_seed(8))
    zeros, nonzeros, dropped = activation_stats(z.requires_grad_())
    assert (relu2_24(z, Relu24Options()) != 0).sum() == nonzeros - dropped
    assert (relu2_24(z, Relu24Options(sparse=False)) == 0).sum() == zeros


@pytest.mark.parametrize("method, want", (("magnitude", 0.104), ("soft_threshold", 0.364)))
def test_relative_error_of_pruning_on_normal_input(method, want):
    """‖s − relu²(z)‖ / ‖relu²(z)‖ for z from N(0, 1); 32,000 groups put it within 0.004 of its expectation."""
    z = torch.randn(2000, 64, generator=torch.Generator().manual_seed(10))
    error = rms_ratio(relu2_24(z, Relu24Options(method=method)), relu2_24(z, Relu24Options(sparse=False)))
    assert abs(error - want) < 0.004
