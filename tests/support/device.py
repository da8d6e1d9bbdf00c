"""The device that tests run on: `pytest --device cpu | cuda`, and everything that depends on it.

- `cpu`, the default: GPUs are hidden from pytest and from all that it starts, so that what is tested does not depend on
  the machine. Tests in tests/gpu are skipped.
- `cuda`: tests marked `any_device` run with CUDA and NCCL, those of tests/gpu too; the others are deselected.

A shared test makes its tensors as for the CPU; `OnDevice` makes them on the device, with the same values where the test
gives a generator. `needs_gpus` skips where ranks outnumber GPUs: NCCL takes one rank for each.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

CHOICES = ("cpu", "cuda")
NO_GPU = "torch sees no CUDA device"


def why_no_cuda() -> str | None:
    """Why tests cannot run with `--device cuda` here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"{NO_GPU}: this is torch {torch.__version__}, built without CUDA"
    return f"{NO_GPU}; `nvidia-smi` shows whether its driver does"


def configure(config: pytest.Config) -> None:
    """Apply `--device` to this process and those that it starts.

    Raises:
        pytest.exit: with status 2, `--device cuda` without a GPU.
    """
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for GPUs must not start CUDA where tests fork
    if (reason := why_no_cuda()) is not None:
        pytest.exit(f"--device cuda: {reason}", returncode=2)


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of the GPU on a CPU; on a GPU keep the shared ones and those."""
    on_gpu = {item for item in items if "gpu" in item.path.parts or item.get_closest_marker("gpu_only")}
    if config.getoption("--device") == "cpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="runs on a GPU: pytest --device cuda"))
        return
    kept = [item for item in items if item in on_gpu or item.get_closest_marker("any_device")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def needs_gpus(ranks: int) -> None:
    """Skip the running test if there are GPUs, but fewer than ranks."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        count = torch.cuda.device_count()
        pytest.skip(f"{ranks} ranks, {count} {'GPU' if count == 1 else 'GPUs'} here: NCCL takes one rank for each GPU")


class OnDevice(TorchFunctionMode):
    """New tensors without a device are on `device`; those from a CPU generator are drawn on the CPU, then moved."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None:
            if kwargs.get("generator") is None:
                kwargs["device"] = self.device
            else:
                wanted = kwargs.pop("requires_grad", False)
                return func(*args, **kwargs).to(self.device).requires_grad_(wanted)
        return func(*args, **kwargs)


def makes_tensors(item: pytest.Item) -> bool:
    """Whether a shared test makes tensors itself; `any_device("processes")` only starts processes that do."""
    marker = item.get_closest_marker("any_device")
    return marker is not None and marker.args != ("processes",)


def on_device(device: torch.device) -> Iterator[None]:
    """A fixture's body: the test runs in `OnDevice`, unless that is the CPU."""
    if device.type == "cpu":
        yield
        return
    with OnDevice(device):
        yield
