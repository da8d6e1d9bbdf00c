"""For every test: `import ranks` works (this folder is on the path), and its processes end with the session."""

import sys
from pathlib import Path

import pytest
from support import ranks


def pytest_addoption(parser):
    parser.addoption(
        "--require-lab", action="store_true", help="fail where tests would skip for want of a lab of hosts"
    )


def pytest_collection_modifyitems(config):
    if config.getoption("--require-lab"):
        sys.path.append(str(Path(__file__).parent / "launch"))
        from lab import why_not

        if why_not() is not None:
            raise pytest.UsageError(f"--require-lab: there can be no lab of hosts here: {why_not()}")


def pytest_sessionfinish():
    ranks.close_all()


@pytest.fixture
def one_rank():
    """A default process group of this process alone, and no groups of Megatron's."""
    import torch

    if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
        megatron.destroy_model_parallel()  # of a test before, in this process
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
