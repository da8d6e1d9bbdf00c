"""Kernels on a GPU at full sizes: against fp64, bits of repeated runs, memory, graphs, streams, compile, autocast."""

import dataclasses
import math

import pytest
import torch
from support.relu2_24_oracle import CASES, case_name, rms_ratio, saved_bytes

from elas.bench.kernel_check import BOUNDS, NAMES, Operands, computed, operands, truth
from elas.kernels.relu2_24 import Relu24Options, ffn_core, implementations, registry

MASKED = Relu24Options()
TOLERANCES = {torch.float32: BOUNDS["float32"], torch.bfloat16: BOUNDS["bfloat16"]}

MODES = [
    ("fused", "triton"),
    ("fused", "chunked"),
    ("compressed", "triton"),
    ("compressed", "cusparselt"),
    ("compressed", "cutlass"),
    ("fused", "torch"),
    ("compressed", "torch"),
    ("eager", "reference"),
]
every_mode = pytest.mark.parametrize("memory, name", MODES, ids=str)
every_case = pytest.mark.parametrize("options", CASES, ids=case_name)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
OURS = pytest.mark.parametrize("memory, name", MODES[:3], ids=str)


def run(u, m_up, n_down, dv, options, implementation):
    return computed(Operands(u, m_up, n_down, dv), options, implementation)


def of_memory(options, memory):
    return dataclasses.replace(options, ffn_memory=memory)


def skip_if_refused(memory, name, options, dtype, device, widths):
    (one,) = [one for one in implementations(memory) if one.name == name]
    reason = registry.obstacle(one, of_memory(options, memory), device, dtype, registry.Widths(*widths))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def agree(memory, name, options, dtype, device, n, r_in, f, r_out):
    skip_if_refused(memory, name, options, dtype, device, (r_in, f, r_out))
    args = operands(n, r_in, f, r_out, dtype, device)
    got, want = run(*args, of_memory(options, memory), name), truth(args, options)
    for each in NAMES:
        assert got[each].dtype == dtype
        assert rms_ratio(got[each], want[each]) < TOLERANCES[dtype], each


@every_dtype
@every_case
@every_mode
def test_every_mode_and_method_against_fp64(memory, name, options, dtype, device):
    agree(memory, name, options, dtype, device, 2048, 128, 1408, 128)


@every_dtype
@pytest.mark.parametrize("rank", (8, 16, 64, 100, 192, 256, 384, 512, 700, 1024))
@pytest.mark.parametrize("memory, name", MODES[:4], ids=str)
def test_every_rank_against_fp64(memory, name, rank, dtype, device):
    agree(memory, name, MASKED, dtype, device, 2048, rank, 2 * 1376, rank)


@every_dtype
@pytest.mark.parametrize(
    "shape", ((1, 64, 256, 64), (37, 24, 60, 20), (1001, 72, 1372, 136), (4099, 256, 5508, 200)), ids=str
)
@pytest.mark.parametrize("memory, name", MODES[:3], ids=str)
def test_odd_shapes_against_fp64(memory, name, shape, dtype, device):
    agree(memory, name, Relu24Options(method="soft_threshold", scale=1.3), dtype, device, *shape)
    agree(memory, name, MASKED, dtype, device, *shape)


@pytest.mark.parametrize("shape", ((16384, 128, 2064, 128), (16384, 512, 8256, 512), (65536, 256, 4104, 256)), ids=str)
@OURS
def test_full_sizes_against_fp64(memory, name, shape, device):
    agree(memory, name, MASKED, torch.bfloat16, device, *shape)


@every_dtype
@OURS
def test_no_tokens(memory, name, dtype, device):
    got = run(*operands(0, 64, 256, 72, dtype, device), of_memory(MASKED, memory), name)
    assert got["v"].shape == (0, 72)
    assert not got["dm_up"].any() and not got["dn_down"].any()


@pytest.mark.parametrize("bad", (math.nan, math.copysign(math.nan, -1.0), math.inf, -math.inf), ids=str)
@every_case
@OURS
def test_what_is_not_finite_comes_out_where_it_does_in_pytorch(memory, name, options, bad, device):
    """One bad number in u, m_up or dv."""
    for place, at in ((0, 0), (1, 3), (3, 1)):
        args = list(operands(64, 64, 256, 64, torch.bfloat16, device))
        x = args[place].detach().clone()
        x[at, 5] = bad
        args[place] = x.requires_grad_(place < 2)
        got, want = (run(*args, of_memory(options, memory), by) for by in (name, "torch"))
        for each in NAMES:
            assert torch.equal(got[each].isfinite(), want[each].isfinite()), (place, each)


@every_dtype
@OURS
def test_fifty_runs_have_the_same_bits(memory, name, dtype, device):
    args = operands(4096, 256, 2064, 256, dtype, device)
    first = run(*args, of_memory(MASKED, memory), name)
    for _ in range(50):
        again = run(*args, of_memory(MASKED, memory), name)
        assert all(torch.equal(again[each], first[each]) for each in NAMES)


@pytest.mark.parametrize("memory, kept", (("fused", 0.0), ("compressed", 0.5625), ("eager", 2.5)))
def test_memory_kept_and_peak(memory, kept, device):
    """Kept as documented; at its peak `fused` holds nothing d_ff wide."""
    u, m_up, n_down, dv = operands(16384, 128, 8192, 128, torch.bfloat16, device)
    options, wide = of_memory(MASKED, memory), 2 * 16384 * 8192
    run(u, m_up, n_down, dv, options, "auto")
    assert saved_bytes(lambda: ffn_core(u, m_up, n_down, options), (u, m_up, n_down)) / wide == kept
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(u, m_up, n_down, dv, options, "auto")
    peak = (torch.cuda.max_memory_allocated() - before) / wide
    assert peak < {"fused": 0.25, "compressed": 4.7, "eager": 12}[memory]


@OURS
def test_a_cuda_graph_replays_it(memory, name, device):
    args = operands(2048, 128, 1376, 128, torch.bfloat16, device)
    options = of_memory(MASKED, memory)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*args, options, name)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*args, options, name)
    fresh = operands(2048, 128, 1376, 128, torch.bfloat16, device, seed=1)
    with torch.no_grad():
        for place, x in zip(args, fresh, strict=True):
            place.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    want = run(*fresh, options, name)
    assert all(torch.equal(captured[each], want[each]) for each in NAMES)


@OURS
def test_streams_do_not_disturb_each_other(memory, name, device):
    options = of_memory(MASKED, memory)
    inputs = [operands(4096, 128, 2064, 128, torch.bfloat16, device, seed) for seed in range(4)]
    want = [run(*args, options, name) for args in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        got = []
        for stream, args in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(*args, options, name))
        torch.cuda.synchronize()
        for one, other in zip(got, want, strict=True):
            assert all(torch.equal(one[each], other[each]) for each in NAMES)


@every_case
@pytest.mark.parametrize("memory", ("fused", "compressed", "eager"))
def test_torch_compile_takes_it_whole(memory, options, device):
    options = of_memory(options, memory)
    args = operands(1024, 64, 512, 64, torch.bfloat16, device)

    def function(u, m_up, n_down):
        return 2 * ffn_core(1.5 * u, m_up, n_down, options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for one, other in zip(
        *(torch.autograd.grad(f(*args[:3]), args[:3], args[3]) for f in (compiled, function)), strict=True
    ):
        assert rms_ratio(one, other) < 1e-2


@OURS
def test_under_autocast_it_is_bf16(memory, name, device):
    options = of_memory(MASKED, memory)
    args = operands(1024, 64, 512, 64, torch.float32, device)
    with torch.autocast("cuda", torch.bfloat16):
        v = ffn_core(*args[:3], options, name)
    assert v.dtype == torch.bfloat16
    grads = torch.autograd.grad(v, args[:3], args[3].bfloat16())
    low = [x.detach().bfloat16().requires_grad_() for x in args[:3]]
    want = run(*low, args[3].bfloat16(), options, name)
    assert torch.equal(v, want["v"])
    for one, each in zip(grads, NAMES[1:], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, want[each].float())
