"""Weights of a Hugging Face folder: safetensors in shards, and their index."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from elas.errors import Failure
from elas.plan.shapes import Shape

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def plan_shards(shapes: dict[str, Shape], dtype: torch.dtype, limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names of the tensors in each shard, in order; a tensor larger than `limit` bytes has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + numel > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += numel
    return shards


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, Shape],
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
) -> int:
    """Write tensors as transformers does, a shard in memory at a time.

    Args:
        folder: exists.
        tensors: in the order of `shapes`.
        shapes: of all tensors.
        dtype: of all tensors.
        limit: bytes of a shard.

    Returns:
        Bytes of the tensors.
    """
    shards = plan_shards(shapes, dtype, limit)
    where = {name: number for number, names in enumerate(shards) for name in names}
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    waiting: list[dict[str, torch.Tensor]] = [{} for _ in shards]
    for name, tensor in tensors:
        number = where[name]
        waiting[number][name] = tensor.contiguous()
        if len(waiting[number]) == len(shards[number]):
            save_file(waiting[number], folder / files[number], metadata={"format": "pt"})
            waiting[number] = {}
    if missing := [name for number in waiting for name in number]:
        raise Failure(f"{folder}: {len(missing)} tensors were left over, such as {missing[0]}")
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = total * dtype.itemsize
    if len(shards) > 1:
        weight_map = {name: files[number] for name, number in where.items()}
        index = {"metadata": {"total_size": size, "total_parameters": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return size
