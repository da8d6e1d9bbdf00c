"""Layout-independent initialisation: a parameter's values depend only on seed, global name and full shape.

Every TP × PP × ZeRO layout starts from the same model, so layouts can be compared step by step. The full tensor is
drawn on the CPU in fp32 on every device, and each rank keeps its slice: a rank draws t times what it keeps (about a
second for a 32000 × 4096 embedding).
"""

import hashlib

import torch
from megatron.core import parallel_state as mpu

from elas.model.shards import full_shape, global_names, shard


@torch.no_grad()
def initialise(model: torch.nn.Module, *, seed: int, std: float) -> None:
    """Fill every parameter of one chunk.

    Matrices are normal with mean 0 and the parameter's `init_std`, or `std` if it has none. Vectors get their
    `init_value`, or without one 0 for biases and 1 for norm weights.

    Args:
        model: a Megatron `GPTModel`.
        seed: the run's seed.
        std: standard deviation of matrices without `init_std`.
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
