"""Running without CUDA: the shims."""

import subprocess
import sys

import pytest
import torch

from elas import accelerator
from elas.errors import UserError

pytestmark = pytest.mark.timeout(300)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")


@without_cuda
def test_cuda_means_cpu():
    assert accelerator.prepare()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype is torch.float64
    assert torch.zeros(2, pin_memory=True).pin_memory().device.type == "cpu"
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    assert torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state())
    assert torch.zeros(2).type() == "torch.FloatTensor"  # but to Megatron:
    assert eval("x.type()", {"__name__": "megatron.core.optimizer", "x": torch.zeros(2)}) == "torch.cuda.FloatTensor"


class OnTheDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones((), device="cuda")  # as recomputation does


@without_cuda
def test_cuda_means_cpu_in_the_backward_pass_too():
    accelerator.prepare()
    x = torch.ones(2, requires_grad=True)
    OnTheDevice.apply(x).sum().backward()
    OnTheDevice.apply(x).backward(gradient=torch.ones(2), retain_graph=True)
    torch.autograd.backward(OnTheDevice.apply(x), torch.ones(2))
    assert torch.equal(x.grad, torch.full((2,), 3.0))
    assert torch.equal(torch.autograd.grad(OnTheDevice.apply(x).sum(), x)[0], torch.ones(2))


def test_the_shims_are_inert_where_cuda_exists():
    code = (
        "import torch\nbefore = torch.cuda.current_device\ntorch.cuda.is_available = lambda: True\n"
        "from elas import accelerator\nassert accelerator.prepare() is False\n"
        "assert torch.cuda.current_device is before and accelerator._mode is None\n"
        "assert torch.overrides._get_current_function_mode_stack() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_streams_fork_and_return():
    tracker = accelerator.CpuRngTracker()
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


def test_ranks_without_a_gpu_of_their_own_are_refused(monkeypatch):
    """On a host with GPUs; without any, ranks share the cores."""
    accelerator.check_gpus(64)
    monkeypatch.setattr(accelerator, "gpus_here", lambda: 1)
    accelerator.check_gpus(1)
    with pytest.raises(UserError, match=r"^2 ranks on a host with 1 GPU: NCCL takes one .* CUDA_VISIBLE_DEVICES=''$"):
        accelerator.check_gpus(2)
