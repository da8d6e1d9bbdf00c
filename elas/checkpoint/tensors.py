"""A rank's part of a whole tensor as rectangles, the form that torch.distributed.checkpoint expects, without copies.

ZeRO splits the flattened tensor-parallel shard of a parameter, so a rank holds a range of it: part of a row, whole
rows, part of a row. Each is a rectangle of the whole tensor and a view into ZeRO's own buffer. A tensor written on one
layout can be read into the rectangles of any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Place:
    """The position of a tensor-parallel shard in the whole tensor.

    Args:
        shape: shape of the shard.
        full_shape: shape of the whole tensor.
        dim: the sharded dimension; None if every rank holds the whole tensor.
        rank: this rank's number in the tensor-parallel group.
        stride: number of blocks of that dimension that are sharded separately: 2 for fused gate and up projections.
    """

    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    dim: int | None = None
    rank: int = 0
    stride: int = 1

    def rectangles(self, start: int, numel: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Split elements `[start, start + numel)` of the flattened shard into rectangles.

        Yields:
            Offsets in the whole tensor, sizes, and the index of the first element in the flattened shard.
        """
        shard_rows, columns = (*self.shape, 1)[:2]  # of a vector: one column
        block = shard_rows // self.stride if self.dim == 0 else shard_rows
        end = start + numel
        while start < end:
            row, column = divmod(start, columns)
            whole_rows = (end - start) // columns
            if column or not whole_rows:  # within a row
                rows, width = 1, min(columns - column, end - start)
            else:  # whole rows, up to the end of the range or of the block
                rows, width = min(whole_rows, block - row % block), columns
            yield self._offsets(row, column, block), (rows, width)[: len(self.shape)], start
            start += rows * width

    def _offsets(self, row: int, column: int, block: int) -> tuple[int, ...]:
        if self.dim == 0:
            number, inside = divmod(row, block)
            row = number * (self.full_shape[0] // self.stride) + self.rank * block + inside
        elif self.dim == 1:
            column += self.rank * self.shape[1]
        return (row, column)[: len(self.shape)]


class PartOfTensor(torch.Tensor):
    """A tensor with the whole shape of which this process holds some rectangles; supports only saving and loading.

    Attributes:
        parts: offsets in the whole tensor → view of the rectangle there.
    """

    parts: dict[tuple[int, ...], torch.Tensor]

    @staticmethod
    def __new__(cls, full_shape: tuple[int, ...], dtype: torch.dtype, parts: dict):
        """Create a wrapper without storage of its own."""
        made = torch.Tensor._make_wrapper_subclass(cls, full_shape, dtype=dtype)
        made.parts = parts
        return made

    @classmethod
    def of(cls, place: Place, flat: torch.Tensor, start: int) -> "PartOfTensor":
        """Create it from a range of a shard.

        Args:
            place: position of the shard.
            flat: the range, contiguous `[numel]`; viewed, not copied.
            start: index of its first element in the flattened shard.
        """
        parts = {}
        for offsets, sizes, first in place.rectangles(start, flat.numel()):
            numel = torch.Size(sizes).numel()
            parts[offsets] = flat.narrow(0, first - start, numel).view(sizes)
        return cls(place.full_shape, flat.dtype, parts)

    def copied(self) -> "PartOfTensor":
        """The same with copies of the rectangles in host memory."""
        parts = {offsets: part.to("cpu", copy=True) for offsets, part in self.parts.items()}
        return PartOfTensor(tuple(self.shape), self.dtype, parts)

    def __create_write_items__(self, fqn: str, _object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), part.size()) for offsets, part in self.parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None  # of a part of a tensor
        return self.parts[tuple(index.offset)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on a PartOfTensor")
