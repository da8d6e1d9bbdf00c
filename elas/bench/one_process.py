"""Process groups of a single rank, for benchmarks that measure the modules that train, in their own process."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from elas import parallel
from elas.config import ParallelConfig
from elas.errors import UserError

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@contextlib.contextmanager
def one_process(seed: int = 0) -> Iterator[parallel.Layout]:
    """The layout of one rank, inside which Megatron's and DeepSpeed's modules work.

    The launcher's variables stand while it is entered (DeepSpeed insists on them); the groups stay until the process
    ends, since DeepSpeed cannot replace its process groups.

    Raises:
        UserError: a launcher started several processes.
    """
    if parallel.world_size() > 1:
        raise UserError("this benchmark is one process; start it without a launcher")
    before = {name: os.environ.get(name) for name in LAUNCHER}
    try:
        if not parallel.mpu.model_parallel_is_initialized():
            for name in LAUNCHER:
                os.environ.pop(name, None)
            yield parallel.initialize(ParallelConfig(), seed=seed)
        else:
            if dist.get_world_size() > 1:
                raise UserError("this benchmark is one process; this one belongs to a group of several")
            os.environ.update(LAUNCHER)
            yield parallel.current_layout()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
