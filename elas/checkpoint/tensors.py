"""What a rank holds of a whole tensor, as torch.distributed.checkpoint wants to see it: a few rectangles, in place.

ZeRO cuts the flattened tensor-parallel shard of a parameter, so a rank holds a stretch of it: part of a row, whole
rows, part of a row. Each is a rectangle of the whole tensor, and a view into ZeRO's own buffer. Written by one layout,
it reads into the rectangles of any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Place:
    """Where a tensor-parallel shard lies in the whole tensor.

    Args:
        shape: of the shard.
        full_shape: of the whole tensor.
        dim: dimension that is cut, None where every rank holds all.
        rank: this rank's number in the tensor-parallel group.
        stride: blocks of the cut dimension that are cut each by itself: 2 for a gate and an up projection in one.
    """

    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    dim: int | None = None
    rank: int = 0
    stride: int = 1

    def rectangles(self, start: int, numel: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Cut elements `[start, start + numel)` of the flattened shard into rectangles.

        Yields:
            Offsets in the whole tensor, sizes, and the flat index in the shard of the first element.
        """
        columns = self.shape[1] if len(self.shape) > 1 else 1
        block = self.shape[0] // self.stride if self.dim == 0 else self.shape[0]
        end = start + numel
        while start < end:
            row, column = divmod(start, columns)
            whole_rows = (end - start) // columns
            if column or not whole_rows:  # within a row
                rows, width = 1, min(columns - column, end - start)
            else:  # up to the end of the rows, or of the block that stays together
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
    """A tensor of the whole shape of which this process holds some rectangles; good for saving and loading only.

    Attributes:
        parts: offsets in the whole tensor → a view of what is held there.
    """

    parts: dict[tuple[int, ...], torch.Tensor]

    @staticmethod
    def __new__(cls, full_shape: tuple[int, ...], dtype: torch.dtype, parts: dict):
        """A wrapper without memory of its own."""
        made = torch.Tensor._make_wrapper_subclass(cls, full_shape, dtype=dtype)
        made.parts = parts
        return made

    @classmethod
    def of(cls, place: Place, flat: torch.Tensor, start: int) -> "PartOfTensor":
        """Of a stretch of a shard.

        Args:
            place: of the shard.
            flat: the stretch, contiguous `[numel]`; its elements are viewed, not copied.
            start: index of its first element in the flattened shard.
        """
        parts = {}
        for offsets, sizes, first in place.rectangles(start, flat.numel()):
            numel = torch.Size(sizes).numel()
            parts[offsets] = flat.narrow(0, first - start, numel).view(sizes)
        return cls(place.full_shape, flat.dtype, parts)

    def copied(self) -> "PartOfTensor":
        """The same with copies of the rectangles, in host memory."""
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
        return self.parts[tuple(index.offset)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a part of a tensor")
