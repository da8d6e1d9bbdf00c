"""Process groups of a single rank, in which a benchmark can run the modules used in training."""

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
    """A context with the layout of one rank, in which Megatron's and DeepSpeed's modules work.

    A launcher's variables are set inside, since DeepSpeed requires them. The groups exist until the process ends, since
    DeepSpeed cannot replace its process groups.

    Raises:
        UserError: a launcher started several processes.
    """
    if parallel.world_size() > 1:
        raise UserError("this benchmark is one process; start it without a launcher")
    before = {name: os.environ.get(name) for name in LAUNCHER}
    try:
        if parallel.mpu.model_parallel_is_initialized():
            if dist.get_world_size() > 1:
                raise UserError("this benchmark is one process; this one belongs to a group of several")
            layout = parallel.current_layout()
        else:
            for name in LAUNCHER:  # with them, it would look for a rendezvous
                os.environ.pop(name, None)
            layout = parallel.initialize(ParallelConfig(), seed=seed)
        os.environ.update(LAUNCHER)
        yield layout
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
