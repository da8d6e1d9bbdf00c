"""Names and tensors of Megatron-LM's `torch_dist` checkpoints, for those of ours; both are whole, whatever the layout.

Legend: L layers.

    here, fp32, a layer at a time                    there, all layers in one tensor [L, …]
    weight.decoder.layers.3.mlp.linear_fc1.factor_in decoder.layers.mlp.linear_fc1.factor_in, in the model's dtype
      the same                                       optimizer.state.fp32_param.decoder.layers.…
      the same, by the distributed optimizer         optimizer.state.param.decoder.layers.…
    exp_avg.decoder.layers.3.…                       optimizer.state.exp_avg.decoder.layers.…
    exp_avg_sq.decoder.layers.3.…                    optimizer.state.exp_avg_sq.decoder.layers.…

Both are files of torch.distributed.checkpoint. Tensors go over one by one, so memory is that of the largest.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from elas.checkpoint.tensors import PartOfTensor

MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
OPTIMIZER = "optimizer.state."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Spot:
    """Where a weight of ours lies in a Megatron checkpoint.

    Args:
        key: name of the tensor there, without a prefix of the optimizer's.
        shape: of the weight.
        layer: index in the tensor's first dimension; None where the tensor is the weight.
        layers: size of that dimension.
    """

    key: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the tensor there."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the weight in the tensor."""
        return (0,) * len(self.shape) if self.layer is None else (self.layer, *(0,) * len(self.shape))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as the piece that it is there."""
        return tensor if self.layer is None else tensor[None]


def spots(shapes: dict[str, tuple[int, ...]], stacked: bool = True) -> dict[str, Spot]:
    """Where each weight lies.

    Args:
        shapes: of the model, from `elas.plan.shapes.weight_shapes`.
        stacked: whether layers share tensors; Megatron keeps them apart with `non_homogeneous_layers`.
    """
    matches = {name: _LAYER.fullmatch(name) for name in shapes}
    layers = 1 + max(int(match[1]) for match in matches.values() if match)
    return {
        name: Spot(f"decoder.layers.{match[2]}", shapes[name], int(match[1]), layers)
        if (match := matches[name]) and stacked
        else Spot(name, shapes[name])
        for name in shapes
    }


class OnDemand(PartOfTensor):
    """A tensor for writing whose rectangles are made when they are written.

    Attributes:
        makers: offsets in the whole tensor → size of the rectangle, and what makes it.
    """

    makers: dict[tuple[int, ...], tuple[tuple[int, ...], Callable[[], torch.Tensor]]]

    @staticmethod
    def __new__(cls, full_shape: tuple[int, ...], dtype: torch.dtype, makers: dict):
        """A wrapper without memory of its own."""
        made = torch.Tensor._make_wrapper_subclass(cls, full_shape, dtype=dtype)
        made.makers = makers
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, (size, _) in self.makers.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None  # of a part of a tensor
        return self.makers[tuple(index.offset)][1]()
