"""Megatron-core's process groups, and the interface to them that DeepSpeed expects as `mpu`.

Ranks are laid out as in Megatron: tensor parallel varies fastest, then data parallel, then pipeline. Each process calls
`initialize` once, after the configuration was validated.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] public, but not in `__all__`

from elas import accelerator
from elas.config import ParallelConfig
from elas.errors import Failure


@dataclass(frozen=True)
class Layout:
    """Sizes of, and this process's ranks in, the tensor (tp), pipeline (pp) and data (dp) dimensions."""

    tp: int
    pp: int
    dp: int
    vpp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    rank: int
    world: int
    sequence_parallel: bool

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage holds the output layer and computes the loss."""
        return self.pp_rank == self.pp - 1


def world_size() -> int:
    """Number of processes that the launcher started, 1 without a launcher; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: ParallelConfig, *, seed: int, timeout_s: float | None = None) -> Layout:
    """Create every process group and seed the model-parallel random streams.

    Args:
        config: sizes; `world size / (tensor · pipeline)` ranks are data parallel.
        seed: the run's seed.
        timeout_s: time-out of the rendezvous and of collectives; None for 1800 s.

    Returns:
        This process's place in the layout.

    Raises:
        Failure: not all ranks connected in time, or the port is in use.
        UserError: this host has ranks without a GPU of their own.
    """
    accelerator.prepare_megatron()
    if accelerator.has_cuda():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        accelerator.check_gpus(local + 1)
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # one process without a launcher; DeepSpeed requires a launcher's variables
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            dist.init_process_group(accelerator.backend(), store=HashStore(), rank=0, world_size=1)
        else:
            _meet(timedelta(seconds=timeout_s or 1800.0))
    with accelerator.shared_gloo_groups():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
        )
    layout = current_layout(config.sequence)
    accelerator.seed_model_parallel(seed, layout.tp_rank, layout.pp_rank)
    return layout


def _meet(timeout: timedelta) -> None:
    """Connect to the other ranks at MASTER_ADDR:MASTER_PORT."""
    try:
        dist.init_process_group(accelerator.backend(), timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise Failure(f"ranks cannot connect at {where}: the port is in use there; give another") from error
        why = f"not all {os.environ['WORLD_SIZE']} ranks connected to {where} within {timeout.total_seconds():g} s"
        raise Failure(f"{why} ({error})"[:400]) from error


def current_layout(sequence_parallel: bool = False) -> Layout:
    """The layout of Megatron's current process groups."""
    return Layout(
        tp=mpu.get_tensor_model_parallel_world_size(),
        pp=mpu.get_pipeline_model_parallel_world_size(),
        dp=mpu.get_data_parallel_world_size(),
        vpp=mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        sequence_parallel=sequence_parallel,
    )


def tensor_group() -> dist.ProcessGroup:
    """This rank's tensor-parallel group."""
    return _made(mpu.get_tensor_model_parallel_group())


def data_group() -> dist.ProcessGroup:
    """This rank's data-parallel group."""
    return _made(mpu.get_data_parallel_group())


def stage_group() -> dist.ProcessGroup:
    """The ranks of this rank's pipeline stage: tensor × data parallel."""
    return _made(mpu.get_tensor_and_data_parallel_group())


def model_group() -> dist.ProcessGroup:
    """The ranks that hold one copy of the model: tensor × pipeline parallel."""
    return _made(mpu.get_model_parallel_group())


def _made(group: object) -> dist.ProcessGroup:
    """Megatron's getters also allow a group's absence, which they raise on unless asked not to."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def shut_down() -> None:
    """Destroy Megatron's groups but keep the default process group (see `torch.distributed.destroy_process_group`)."""
    mpu.destroy_model_parallel()


def leave() -> None:
    """Destroy all process groups, at the end of a process."""
    shut_down()
    dist.destroy_process_group()


class DeepSpeedGroups:
    """The interface of `mpu` that DeepSpeed expects, implemented with Megatron's groups.

    DeepSpeed's "model parallel" group is all ranks that hold a part of one model copy: tensor × pipeline. Its
    model-parallel *rank*, however, only decides which rank counts replicated parameters in the gradient norm. Stages do
    not replicate each other, so that must be the tensor-parallel rank (ZeRO 3 has no finer distinction).
    """

    get_model_parallel_group = staticmethod(mpu.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(mpu.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(mpu.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(mpu.get_tensor_model_parallel_rank)
    get_pipeline_model_parallel_group = staticmethod(mpu.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(mpu.get_pipeline_model_parallel_world_size)
    get_data_parallel_group = staticmethod(mpu.get_data_parallel_group)
    get_data_parallel_world_size = staticmethod(mpu.get_data_parallel_world_size)
    get_data_parallel_rank = staticmethod(mpu.get_data_parallel_rank)

    def get_model_parallel_world_size(self) -> int:
        """Tensor × pipeline size."""
        return dist.get_world_size(model_group())

    def get_model_parallel_rank(self) -> int:
        """The tensor-parallel rank, not the one in the model-parallel group; see the class."""
        return mpu.get_tensor_model_parallel_rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(data_group())
