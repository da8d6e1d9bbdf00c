"""For every test: `import ranks` works (this folder is on the path), and its processes end with the session."""

import pytest
import ranks


def pytest_sessionfinish():
    ranks.close_all()


@pytest.fixture
def one_rank():
    """A default process group of this process alone."""
    import torch

    if torch.distributed.is_initialized():  # by a test before, in this process
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
