"""The Triton kernels on a machine without a GPU: interpreted against PyTorch, and not chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, ffn_core, implementations
from elas.kernels.relu2_24.triton import compressed, fused, tiles

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ("interpreted_relu2_24_fused.py", "interpreted_relu2_24_compressed.py"))
def test_interpreted(file):
    """In a process of its own: whether kernels are interpreted is settled when they are made."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_importing_the_kernels_imports_neither_triton_nor_cuda():
    code = (
        "import sys, torch, elas.kernels.relu2_24 as k; "
        "from elas.kernels.relu2_24 import semi_structured; "
        "from elas.kernels.relu2_24.triton import compressed, fused, tiles; "
        "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("memory", ("fused", "compressed"))
def test_on_a_cpu_it_says_why_it_cannot_run(memory):
    assert "triton" in [one.name for one in implementations(memory)]
    args = torch.ones(2, 3), torch.ones(4, 3), torch.ones(5, 4)
    with pytest.raises(ConfigError, match=r"^implementation='triton': .*NVIDIA GPUs, not cpu"):
        ffn_core(*args, Relu24Options(ffn_memory=memory), "triton")
    assert ffn_core(*args, Relu24Options(ffn_memory=memory)).shape == (2, 5)


@pytest.mark.parametrize(
    "capability, dtype, installed, says",
    (
        ((7, 5), torch.bfloat16, True, "not 7.5"),
        ((11, 0), torch.bfloat16, True, "not 11.0"),
        ((9, 0), torch.bfloat16, False, "not installed"),
        ((9, 0), torch.float64, True, "float64"),
        ((9, 0), torch.float32, True, "set_float32_matmul_precision"),
        ((9, 0), torch.bfloat16, True, None),
    ),
)
def test_why_a_gpu_cannot_run_it(monkeypatch, capability, dtype, installed, says):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object() if installed else None)
    reason = fused.obstacle(torch.device("cuda", 0), dtype)
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    "capability, chip",
    (
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_8x"),
        ((8, 9), "sm_8x"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_8x"),
    ),
)
def test_chips(capability, chip):
    assert tiles.chip(capability) == chip


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("chip", tiles.SHARED_BYTES)
def test_a_tile_is_the_smallest_ranks_that_holds_it(chip, dtype):
    if (chip, dtype) == ("sm_100", torch.float32):
        assert tiles.choose(chip, "forward", dtype, 1) is None
        return
    for kernel in ("forward", "du", "weights"):
        assert tiles.choose(chip, kernel, dtype, 1) == tiles.choose(chip, kernel, dtype, 128)
        assert tiles.choose(chip, kernel, dtype, 129) == tiles.choose(chip, kernel, dtype, 256)
        assert tiles.choose(chip, kernel, dtype, 513) is None
        assert tiles.choose(chip, kernel, torch.float64, 8) is None


def test_shares_of_tokens_are_whole_tiles_with_31_bit_offsets():
    tile = tiles.choose("sm_90", "weights", torch.bfloat16, 256)
    share = fused.TritonFused()._share
    assert share(1000, 86, tile, torch.device("cpu"), 256) == 1024  # one processor: not split
    for tokens, stride in ((0, 256), (1, 256), (10**9, 512), (10**6, 2**20)):
        got = share(tokens, 86, tile, torch.device("cpu"), stride)
        assert got % tile.tokens == 0
        assert 0 < got * stride < 2**31


def test_the_launcher_and_the_kernels_count_methods_alike():
    pytest.importorskip("triton", reason="Triton is not installed")
    from elas.kernels.relu2_24.triton import compressed_kernels, groups

    numbers = {
        "DENSE": Relu24Options(sparse=False),
        "MAGNITUDE": Relu24Options(),
        "SOFT_THRESHOLD": Relu24Options(method="soft_threshold"),
    }
    for name, options in numbers.items():
        assert getattr(groups, name).value == fused.method_of(options)
    for name in ("NOTHING", "RHO", "PACKED"):
        assert getattr(compressed_kernels, name).value == getattr(compressed, name)
