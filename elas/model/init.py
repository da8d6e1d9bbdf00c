"""Layout-independent initialisation: a parameter's values depend on (seed, global name, full shape) alone.

Then every TP × PP × ZeRO layout starts from the same model, and layouts can be compared step by step. The full tensor
is drawn on the CPU in fp32, whatever the device, and each rank keeps its slice. What that costs: a rank draws t times
what it keeps (about a second for a 32000 × 4096 embedding).
"""

import hashlib
import re

import torch
from megatron.core import parallel_state as mpu


def global_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of one pipeline stage's chunk by their name in the whole model.

    Args:
        model: a Megatron `GPTModel`, whose layers count from 0 in each chunk.

    Returns:
        The same parameters, `decoder.layers.N` counted over the whole model. The last pipeline stage's copy of a tied
        embedding goes by the embedding's own name.
    """
    numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}

    def rename(match: re.Match) -> str:
        return f"decoder.layers.{numbers[int(match.group(1))]}."

    named = {re.sub(r"^decoder\.layers\.(\d+)\.", rename, name): p for name, p in model.named_parameters()}
    if model.share_embeddings_and_output_weights and "output_layer.weight" in named:
        named["embedding.word_embeddings.weight"] = named.pop("output_layer.weight")
    return named


def full_shape(parameter: torch.nn.Parameter, tp: int) -> tuple[int, ...]:
    """Shape of the whole tensor that `parameter` is a tensor-parallel shard of."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp
    return tuple(shape)


def shard(full: torch.Tensor, parameter: torch.nn.Parameter, tp: int, tp_rank: int) -> torch.Tensor:
    """The part of `full` that belongs to this tensor-parallel rank.

    A `partition_stride` of 2 (Megatron's gate and up in one weight) means that each half is split by itself.
    """
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    return torch.cat(full.chunk(stride * tp, dim=dim)[tp_rank::tp], dim=dim)


@torch.no_grad()
def initialise(model: torch.nn.Module, *, seed: int, std: float) -> None:
    """Fill every parameter of one chunk.

    Matrices are normal with mean 0 and the parameter's `init_std` (else `std`). Vectors have their `init_value`; else
    biases are zeros and norm weights ones.

    Args:
        model: a Megatron `GPTModel`.
        seed: the run's seed.
        std: standard deviation of matrices that have none of their own.
    """
    tp, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    for name, parameter in global_names(model).items():
        if parameter.dim() == 1:
            is_bias = name.rpartition(".")[2].startswith("bias")
            parameter.fill_(getattr(parameter, "init_value", 0.0 if is_bias else 1.0))
            continue
        shape = full_shape(parameter, tp)
        digest = hashlib.sha256(f"{seed}:{name}:{shape}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(shape, dtype=torch.float32).normal_(
            0.0, getattr(parameter, "init_std", std), generator=generator
        )
        parameter.copy_(shard(full, parameter, tp, tp_rank))
