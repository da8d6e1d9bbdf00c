"""Writes and reads tensors in the file format of torch.distributed.checkpoint, one file per rank.

Its parts are called one by one rather than through `save` and `async_save`, to separate planning, which needs all
ranks, from writing, which needs no other rank and can run in the background. Reading executes no code from files:
tensors are read with `weights_only`, and the index, also a pickle, with an unpickler that allows about twenty names.
"""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

INDEX = ".metadata"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Prefixes of the names of Adam's moments in a checkpoint; a weight's is `weight`."""
Tensors = Mapping[str, torch.Tensor]

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {  # Megatron-core keeps the plan with the index
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "uint8", "int64"},
    "pathlib": {"PosixPath"},
}  # fmt: skip


@dataclass
class Plan:
    """What this rank writes, for one layout."""

    mine: SavePlan
    metadata: Metadata | None
    """Metadata of the whole checkpoint; on rank 0 only."""


def make_plan(tensors: Tensors) -> Plan:
    """Plan who writes what; every rank must call it. A plan is valid while names and rectangles stay the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    planner = _planner(tensors)
    gathered: list = [None] * world if rank == 0 else []
    dist.gather_object(planner.create_local_plan(), gathered or None, dst=0)
    metadata, plans = None, None
    if rank == 0:
        plans, metadata = planner.create_global_plan(gathered)
        plans = FileSystemWriter(".").prepare_global_plan(plans)
    mine: list = [None]
    dist.scatter_object_list(mine, plans, src=0)
    return Plan(mine[0], metadata)


def write(folder: Path, plan: Plan, tensors: Mapping[str, Any]) -> list[WriteResult]:
    """Write and sync this rank's part; needs no other rank."""
    planner = _planner(tensors)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    return writer.write_data(planner.finish_plan(plan.mine), planner).wait()


def write_index(folder: Path, plan: Plan, results: list[list[WriteResult]]) -> None:
    """Write the index of all ranks' parts; call it on rank 0 only."""
    assert plan.metadata is not None  # on rank 0
    plan.metadata.planner_data = None
    FileSystemWriter(folder).finish(plan.metadata, results)


def write_alone(folder: Path, tensors: Mapping[str, torch.Tensor | list]) -> None:
    """Write tensors and their index from one process, without process groups; `folder` must exist."""
    planner = _planner(tensors)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    plan = Plan(FileSystemWriter(folder).prepare_global_plan(plans)[0], metadata)
    write_index(folder, plan, [write(folder, plan, tensors)])


def read_index(folder: Path) -> Metadata:
    """Read the index of a checkpoint.

    Raises:
        pickle.UnpicklingError: it is damaged, or contains types that do not belong to an index.
        OSError: it cannot be read.
    """
    return _Reader(folder).read_metadata()


def read(folder: Path, tensors: Tensors, index: Metadata | None = None) -> None:
    """Load the tensors' parts from a checkpoint written on any layout; needs no other rank.

    Args:
        folder: the checkpoint's.
        tensors: to load into, in place; values are converted to each one's dtype.
        index: from `read_index`, to save reading it again.

    Raises:
        RuntimeError: the checkpoint lacks a name, or has another shape for it.
    """
    reader, planner = _Reader(folder), DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = index or reader.read_metadata()
    for name, tensor in tensors.items():
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise RuntimeError(f"{name} is not in the checkpoint")
        if entry.size != tensor.size():
            raise RuntimeError(
                f"{name} has shape {tuple(entry.size)} in the checkpoint, {tuple(tensor.size())} in the model"
            )
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


def read_whole(
    folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, index: Metadata | None = None
) -> torch.Tensor:
    """Read one whole tensor of a checkpoint into host memory, as `dtype`; errors as of `read`."""
    tensor = torch.empty(shape, dtype=dtype)
    read(folder, {name: tensor}, index)
    return tensor


def _planner(tensors: Mapping[str, Any]) -> DefaultSavePlanner:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner.set_up_planner(dict(tensors), None, is_coordinator=not dist.is_initialized() or dist.get_rank() == 0)
    return planner


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module == "pathlib._local":  # what Python 3.13 calls it: indexes must be readable by every Python
            module = "pathlib"
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which does not belong to an index")


class _Reader(FileSystemReader):
    def read_metadata(self, *_args, **_kwargs) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it does not contain an index")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        return metadata
