"""For every test: `import ranks` works (this folder is on the path), and its processes end with the session."""

import sys
from pathlib import Path

import pytest
from support import device as devices
from support import ranks


def pytest_addoption(parser):
    parser.addoption(
        "--require-lab", action="store_true", help="fail where tests would skip for want of a lab of hosts"
    )
    parser.addoption(
        "--device", choices=devices.CHOICES, default="cpu", help="where tests run; cuda: those that can run on a GPU"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "any_device: runs on the device of --device; any_device('processes'): only what it starts"
    )
    config.addinivalue_line("markers", "gpu_only: has no twin on the CPU")
    devices.configure(config)


def pytest_collection_modifyitems(config, items):
    devices.select(config, items)
    if config.getoption("--require-lab"):
        sys.path.append(str(Path(__file__).parent / "launch"))
        from lab import why_not

        if why_not() is not None:
            raise pytest.UsageError(f"--require-lab: there can be no lab of hosts here: {why_not()}")


def pytest_sessionfinish():
    ranks.close_all()


@pytest.fixture
def device(pytestconfig):
    """The device of `--device`, as torch names it."""
    import torch

    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def _tensors_on_the_device(request, pytestconfig):
    """Tests marked `any_device` make their tensors on the device."""
    if pytestconfig.getoption("--device") == "cpu" or not devices.makes_tensors(request.node):
        yield
        return
    yield from devices.on_device(request.getfixturevalue("device"))


@pytest.fixture
def one_rank():
    """A default process group of this process alone, and no groups of Megatron's."""
    import torch

    if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
        megatron.destroy_model_parallel()  # of a test before, in this process
    if torch.distributed.is_initialized():
        yield
        return
    from elas import accelerator

    backend = accelerator.backend()
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
