"""Names of parameters in the whole model, and the part of a whole tensor that a tensor-parallel rank holds."""

import re
from typing import Any

import torch


def global_names(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of one pipeline stage's chunk by their name in the whole model.

    Args:
        model: a Megatron `GPTModel`, whose layers count from 0 in each chunk.

    Returns:
        The same parameters, with N of `decoder.layers.N` counted over the whole model. The last pipeline stage's copy
        of a tied embedding has the name of the embedding.
    """
    numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}

    def rename(match: re.Match) -> str:
        return f"decoder.layers.{numbers[int(match.group(1))]}."

    named = {re.sub(r"^decoder\.layers\.(\d+)\.", rename, name): p for name, p in model.named_parameters()}
    if model.share_embeddings_and_output_weights and "output_layer.weight" in named:
        named["embedding.word_embeddings.weight"] = named.pop("output_layer.weight")
    return named


def full_shape(parameter: Any, tp: int) -> tuple[int, ...]:
    """Shape of the whole tensor that `parameter` is a tensor-parallel shard of."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp
    return tuple(shape)


def shard(full: torch.Tensor, parameter: Any, tp: int, tp_rank: int) -> torch.Tensor:
    """The part of `full` that this tensor-parallel rank holds.

    With a `partition_stride` of 2 (Megatron's gate and up in one weight) each half is split separately.
    """
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    return torch.cat(full.chunk(stride * tp, dim=dim)[tp_rank::tp], dim=dim)
