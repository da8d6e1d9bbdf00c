"""Running without CUDA: the shims."""

import subprocess
import sys

import pytest
import torch

from elas import host

pytestmark = pytest.mark.timeout(300)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")


@without_cuda
def test_cuda_means_cpu():
    assert host.prepare()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype is torch.float64


def test_the_shims_are_inert_where_cuda_exists():
    code = (
        "import torch\nbefore = torch.cuda.current_device\ntorch.cuda.is_available = lambda: True\n"
        "from elas import host\nassert host.prepare() is False\n"
        "assert torch.cuda.current_device is before and host._mode is None\n"
        "assert torch.overrides._get_current_function_mode_stack() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_streams_fork_and_return():
    tracker = host.CpuRngTracker()
    tracker.add("model-parallel-rng", 1)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)  # the outer stream did not move
    states = tracker.get_states()
    with tracker.fork():
        second = torch.rand(3)
    assert not torch.equal(first, second)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(3), second)
