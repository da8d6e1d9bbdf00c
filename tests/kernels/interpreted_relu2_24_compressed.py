"""The Triton kernels of compressed memory, interpreted; run by test_relu2_24_triton.py in a process of its own."""

import triton_interpreter  # noqa: F401  isort: skip  (before anything that imports a kernel)

import itertools
import math

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, fp64_core, rms_ratio

from elas.kernels.relu2_24 import Relu24Options
from elas.kernels.relu2_24.passes import differentiable
from elas.kernels.relu2_24.plain import compressed as plain
from elas.kernels.relu2_24.plain import fused as plain_fused
from elas.kernels.relu2_24.triton import chunked, compressed
from elas.kernels.relu2_24.triton.chunked import TritonChunked
from elas.kernels.relu2_24.triton.compressed import TritonCompressed

DTYPES = (torch.float32, torch.bfloat16)
PRUNED = [options for options in CASES if options.sparse and options.gradient == "masked"]
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)
every_pruning = pytest.mark.parametrize("options", PRUNED, ids=case_name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory comes filled with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def same(got, want):
    """Bit by bit, but any NaN is one."""
    if not got.is_floating_point():
        return torch.equal(got, want)
    nan = want.isnan()
    kind = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
    return torch.equal(got.isnan(), nan) and torch.equal(got.view(kind)[~nan], want.view(kind)[~nan])


def activations(n, f, dtype, seed=0):
    """N(0, 1), a quarter of it small integers full of ties."""
    generator = torch.Generator().manual_seed(seed)
    z, ties = torch.randn(n, f, generator=generator), torch.randint(-1, 3, (n, f), generator=generator).float()
    return torch.where(torch.arange(f) % 16 < 4, ties, z).to(dtype), torch.randn(n, f, generator=generator).to(dtype)


@every_dtype
@every_case
@pytest.mark.parametrize("shape", ((5, 60), (1, 4), (9, 1036)), ids=str)
def test_everything_is_bit_for_bit_what_pytorch_computes(options, dtype, shape):
    """Odd numbers of groups and tokens, several tiles."""
    z, ds = activations(*shape, dtype)
    want_s, want_kept = plain.compress(z, options)
    s, kept = compressed.prune_and_pack(z, options, compressed.PACKED if len(want_kept) == 2 else compressed.RHO)
    assert same(s, want_s)
    assert len(kept) == len(want_kept)
    assert all(map(same, kept, want_kept))
    want_dz = plain.gradient(want_kept, None, ds, options)
    if len(kept) == 2:
        s, dz = compressed.restore(kept, ds, options)
        assert same(s, want_s)
    else:
        assert same(compressed.prune_and_pack(kept[0], options, compressed.NOTHING)[0], want_s)
        dz = compressed.slope(kept[0], ds, options)
    if dtype == torch.float32 and options.scale != 1.0:  # not squares: PyTorch's root on CPU may be one ulp off, 6e-8
        assert rms_ratio(dz, want_dz) < 1.2e-7
    else:
        assert same(dz, want_dz)


@every_dtype
@every_pruning
def test_every_group_of_special_values(options, dtype):
    values = (-math.inf, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf, math.nan, math.copysign(math.nan, -1.0))
    z = torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype).view(-1, 324)
    ds = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=dtype).repeat(81).expand_as(z)
    want_s, want_kept = plain.compress(z, options)
    s, kept = compressed.prune_and_pack(z, options, compressed.PACKED)
    assert same(s, want_s)
    assert all(map(same, kept, want_kept))
    s, dz = compressed.restore(kept, ds, options)
    assert same(s, want_s)
    assert same(dz, plain.gradient(want_kept, None, ds, options))


@every_dtype
@every_case
@pytest.mark.parametrize("shape", ((5, 60), (1, 4), (9, 1036)), ids=str)
def test_in_place_it_is_bit_for_bit_what_pytorch_computes(options, dtype, shape):
    z, ds = activations(*shape, dtype)
    want_s, want_dz = plain_fused.step(z, ds, options)
    assert same(compressed.prune_in_place(z.clone(), options), plain.compress(z, options)[0])
    s, dz = chunked.step(z.clone(), ds.clone(), options)
    if dtype == torch.float32:  # the compiler may fuse a product and a sum; PyTorch rounds scale · s elsewhere
        assert rms_ratio(s, want_s) < 1.2e-7 and rms_ratio(dz, want_dz) < 1.2e-7
    else:
        assert same(s, plain.compress(z, options)[0])
        assert rms_ratio(dz, want_dz) < 3e-3


CORES = pytest.mark.parametrize("passes", (TritonCompressed(), TritonChunked()), ids=("compressed", "chunked"))


@CORES
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)))
@every_case
def test_the_core_agrees_with_fp64(passes, options, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 3)
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 24), (60, 24), (20, 60), (7, 20))
    *leaves, dv = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    v = differentiable(passes)(*leaves, options)
    got = dict(zip(("v", "du", "dm_up", "dn_down"), (v, *torch.autograd.grad(v, leaves, dv)), strict=True))
    for name, want in fp64_core(*leaves, dv, options).items():
        assert rms_ratio(got[name].detach(), want) < tolerance, name


@CORES
@every_case
def test_a_gradient_nobody_wants_is_skipped_and_zero_tokens_pass(passes, options):
    for n, wanted in itertools.product((0, 3), itertools.product((False, True), repeat=3)):
        shapes = ((n, 8), (20, 8), (6, 20))
        args = [torch.ones(shape).requires_grad_(want) for shape, want in zip(shapes, wanted, strict=True)]
        v = differentiable(passes)(*args, options)
        assert v.shape == (n, 6)
        if any(wanted):
            v.backward(torch.ones(()).expand_as(v))
        for arg, want in zip(args, wanted, strict=True):
            assert (arg.grad is not None) == want
            assert arg.grad is None or arg.grad.isfinite().all()


def test_what_is_kept_is_interchangeable():
    """The layout belongs to the memory mode: Triton's backward from PyTorch's forward."""
    options = Relu24Options(ffn_memory="compressed")
    z, ds = activations(4, 40, torch.float32)
    _, kept = plain.compress(z, options)
    assert same(compressed.restore(kept, ds, options, needs_s=False)[1], plain.gradient(kept, None, ds, options))
