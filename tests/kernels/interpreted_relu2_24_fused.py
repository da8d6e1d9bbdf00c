"""The fused Triton kernels, interpreted; test_relu2_24_triton.py runs this file in a process of its own."""

import triton_interpreter  # noqa: F401  isort: skip  (before anything that imports a kernel)

import dataclasses
import itertools
import math

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, fp64_core, rms_ratio

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, ffn_core, reference, registry
from elas.kernels.relu2_24.passes import differentiable
from elas.kernels.relu2_24.plain.fused import TorchFused
from elas.kernels.relu2_24.triton import fused
from elas.kernels.relu2_24.triton.fused import TritonFused
from elas.kernels.relu2_24.triton.tiles import Tile

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""As for every other implementation; sums are fp32, s and dz are rounded once to the dtype."""
TILES = (
    Tile(16, 32, 8, 4, 1),
    Tile(32, 32, 16, 4, 1),
    Tile(16, 16, 4, 4, 1, chunk=16),
    Tile(16, 64, 2, 4, 1, chunk=32),
)
NAMES = ("v", "du", "dm_up", "dn_down")
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory comes filled with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n=37, r_in=24, f=60, r_out=20, dtype=torch.float32, seed=0):
    """u, m_up, n_down (leaves that want gradients) and dv."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, r_in), (f, r_in), (r_out, f), (n, r_out))
    *leaves, dv = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return *(leaf.requires_grad_() for leaf in leaves), dv


def run(u, m_up, n_down, dv, options, tile=TILES[0], core=None):
    """v and every gradient by name."""
    v = (core or differentiable(TritonFused(tile)))(u, m_up, n_down, options)
    return dict(zip(NAMES, (v.detach(), *torch.autograd.grad(v, (u, m_up, n_down), dv)), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_case
def test_forward_and_every_gradient_agree_with_fp64(options, dtype):
    """Odd tokens, f not a multiple of the tile, ranks no power of two."""
    args = inputs(dtype=dtype)
    got = run(*args, options)
    for name, want in fp64_core(*args, options).items():
        assert got[name].dtype == dtype
        assert rms_ratio(got[name], want) < TOLERANCES[dtype], name


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", ((1, 8, 4, 8), (18, 40, 36, 24)), ids=str)
def test_any_tile_gap_and_splitting_of_the_ranks(tile, shape):
    args = inputs(*shape)
    for options in (Relu24Options(), Relu24Options(method="soft_threshold", scale=1.3)):
        got = run(*args, options, tile)
        for name, want in fp64_core(*args, options).items():
            assert rms_ratio(got[name], want) < TOLERANCES[torch.float32], name


@pytest.mark.parametrize("rank", (128, 260))
def test_the_tiles_of_the_table_at_their_ranks(rank):
    """fp32 sums of hundreds of terms average out: the tolerance stays."""
    args = inputs(n=65, r_in=rank, f=68, r_out=rank - 1)
    options = Relu24Options(method="soft_threshold")
    got = run(*args, options, tile=None)
    for name, want in fp64_core(*args, options).items():
        assert rms_ratio(got[name], want) < TOLERANCES[torch.float32], name


@pytest.mark.parametrize("method", ("magnitude", "soft_threshold"))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_groups_of_small_integers_are_pruned_as_in_the_reference(tile, method):
    """z is each of 256 groups full of ties; u and n_down are identities, so z is m_upᵀ and v is s."""
    z = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=4))).view(16, 64)
    options = Relu24Options(method=method)
    v = differentiable(TritonFused(tile))(torch.eye(16), z.T.contiguous(), torch.eye(64), options)
    assert torch.equal(v, reference.prune(z.relu(), options))


def test_dense_takes_any_number_of_features():
    args = inputs(f=59)
    options = Relu24Options(sparse=False)
    got = run(*args, options)
    for name, want in fp64_core(*args, options).items():
        assert rms_ratio(got[name], want) < TOLERANCES[torch.float32], name


@every_case
def test_zero_tokens(options):
    got = run(*inputs(n=0), options)
    assert got["v"].shape == (0, 20)
    assert got["du"].shape == (0, 24)
    assert torch.equal(got["dm_up"], torch.zeros(60, 24))
    assert torch.equal(got["dn_down"], torch.zeros(20, 60))


@pytest.mark.parametrize("bad", (math.nan, math.copysign(math.nan, -1.0), math.inf, -math.inf), ids=str)
@every_case
def test_what_is_not_finite_comes_out_where_it_does_in_pytorch(options, bad):
    """One bad number in u, in m_up and in dv, against the chunked form: where the result is finite, the same."""
    for place in range(3):
        args = list(inputs(n=18, r_in=16, f=32, r_out=16))
        at = (0, 3, 1)[place]
        bad_one = args[(0, 1, 3)[place]].detach().clone()
        bad_one[at, 5] = bad
        args[(0, 1, 3)[place]] = bad_one.requires_grad_(place < 2)
        got, want = run(*args, options), run(*args, options, core=differentiable(TorchFused()))
        for name in NAMES:
            assert torch.equal(got[name].isfinite(), want[name].isfinite()), (place, name)
            finite = want[name].isfinite()
            torch.testing.assert_close(got[name][finite], want[name][finite], rtol=1e-4, atol=1e-4)  # sums of 32


def test_a_gradient_nobody_wants_is_skipped_and_the_others_stay():
    *leaves, dv = inputs()
    full = list(run(*leaves, dv, Relu24Options()).values())[1:]
    for wanted in itertools.product((False, True), repeat=3):
        args = [leaf.detach().clone().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
        v = differentiable(TritonFused(TILES[0]))(*args, Relu24Options())
        assert v.requires_grad == any(wanted)
        if any(wanted):
            v.backward(dv)
        for arg, want, grad in zip(args, wanted, full, strict=True):
            assert torch.equal(arg.grad, grad) if want else arg.grad is None


def test_tokens_shared_among_programs_give_the_same_sums(monkeypatch):
    """Three shares instead of one: fp32 sums in another order."""
    args = inputs(n=80)
    one = run(*args, Relu24Options())
    monkeypatch.setattr(fused, "PROGRAMS_PER_PROCESSOR", 6)  # two tiles of f, so three shares
    three = run(*args, Relu24Options())
    for name in NAMES:
        assert rms_ratio(three[name], one[name]) < TOLERANCES[torch.float32], name
    assert not torch.equal(one["dm_up"], three["dm_up"])


def test_strides_do_not_matter():
    u, m_up, n_down, dv = inputs()
    want = run(u, m_up, n_down, dv, Relu24Options())
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (u, m_up, n_down)]
    got = run(*strided, dv.T.contiguous().T, Relu24Options())
    for name in NAMES:
        assert torch.equal(got[name], want[name]), name
    ones = run(u, m_up, n_down, torch.ones(()).expand_as(dv), Relu24Options())
    assert torch.equal(ones["du"], run(u, m_up, n_down, torch.ones_like(dv), Relu24Options())["du"])
    rows = torch.cat([u.detach(), u.detach()], 1)[:, : u.shape[1]].requires_grad_()
    assert torch.equal(run(rows, m_up, n_down, dv, Relu24Options())["du"], want["du"])


@pytest.mark.parametrize("widths", ((600, 20), (20, 513)))
def test_widths_without_a_tile_are_refused(widths):
    """By name; `auto` passes it over and says so."""
    (one,) = [one for one in registry.implementations("fused") if one.name == "triton"]
    registry.unregister("triton", "fused")
    registry.register(dataclasses.replace(one, available=lambda device, dtype: None))
    try:
        args = inputs(r_in=widths[0], r_out=widths[1])[:3]
        says = rf"^implementation='triton': .*no tile for widths r_in={widths[0]}, r_out={widths[1]} .*; use auto \| "
        with pytest.raises(ConfigError, match=says):
            ffn_core(*args, Relu24Options(), "triton")
        wide = registry.Widths(widths[0], 60, widths[1])
        chosen, why = registry.choose(Relu24Options(), torch.device("cpu"), torch.float32, "auto", wide)
        assert chosen.name != "triton" and "triton: it has no tile for widths" in why
        assert registry.select(Relu24Options(), torch.device("cpu"), torch.float32, "triton").name == "triton"
    finally:
        registry.unregister("triton", "fused")
        registry.register(one)
