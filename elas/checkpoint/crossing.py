"""Maps our weights to tensors of Megatron-LM's `torch_dist` checkpoints; both hold whole tensors, whatever the layout.

Legend: L layers.

    here, fp32, a layer at a time                    there, all layers in one tensor [L, …]
    weight.decoder.layers.3.mlp.linear_fc1.factor_in decoder.layers.mlp.linear_fc1.factor_in, in the model's dtype
      the same                                       optimizer.state.fp32_param.decoder.layers.…
      the same, by the distributed optimizer         optimizer.state.param.decoder.layers.…
    exp_avg.decoder.layers.3.…                       optimizer.state.exp_avg.decoder.layers.…
    exp_avg_sq.decoder.layers.3.…                    optimizer.state.exp_avg_sq.decoder.layers.…

Both use the file format of torch.distributed.checkpoint. Tensors are converted one by one, so the memory needed is that
of the largest.
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
    """The position of one of our weights in a Megatron checkpoint.

    Args:
        key: name of the tensor there, without an optimizer prefix.
        shape: shape of the weight.
        layer: index in the tensor's first dimension; None if the tensor is the weight itself.
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
        """Offsets of the weight in the tensor."""
        return (0,) * len(self.shape) if self.layer is None else (self.layer, *(0,) * len(self.shape))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the weight's shape as a slice of the tensor there."""
        return tensor if self.layer is None else tensor[None]


def spots(shapes: dict[str, tuple[int, ...]], stacked: bool = True) -> dict[str, Spot]:
    """The position of each weight, by its name.

    Args:
        shapes: the model's, from `elas.plan.shapes.weight_shapes`.
        stacked: whether all layers share a tensor; with `non_homogeneous_layers`, Megatron keeps them apart.
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
    """A tensor to write whose rectangles are computed only when they are written.

    Attributes:
        makers: offsets in the whole tensor → size of the rectangle, and the function that computes it.
    """

    makers: dict[tuple[int, ...], tuple[tuple[int, ...], Callable[[], torch.Tensor]]]

    @staticmethod
    def __new__(cls, full_shape: tuple[int, ...], dtype: torch.dtype, makers: dict):
        """Create a wrapper without storage of its own."""
        made = torch.Tensor._make_wrapper_subclass(cls, full_shape, dtype=dtype)
        made.makers = makers
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, (size, _) in self.makers.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None  # of a part of a tensor
        return self.makers[tuple(index.offset)][1]()
