"""The training state of one rank as tensors, and its putting back: weights, fp32 masters, moments, random streams.

Reads ZeRO's own buffers where they lie, at every stage, so that what is put back is what was there to the last bit.
"""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from elas.train.engine import Engine
from elas.train.fragments import base_state


def _weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Low-precision (or fp32) weights as this rank holds them: whole parameters, or ZeRO-3's shards."""
    named = [(f"{i}.{n}", p) for i, chunk in enumerate(engine.chunks) for n, p in chunk.named_parameters()]
    return {name: p.ds_tensor if engine.stage == 3 else p.data for name, p in named}


def _updated(engine: Engine) -> list[torch.Tensor]:
    """What the optimizer updates: flat fp32 partitions (ZeRO 1–3), fp32 copies (bf16 at ZeRO 0), or the weights."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if engine.stage > 0:
        return list(optimizer.single_partition_of_fp32_groups)
    groups = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [p for group in groups for p in group]


def capture(engine: Engine) -> dict:
    """Everything this rank needs to go on exactly: references to live tensors, to be written before the next step."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "weights": _weights(engine),
        "masters": [tensor.detach() for tensor in _updated(engine)],
        "moments": [dict(base_state(engine)[tensor]) for tensor in _updated(engine)],
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "megatron": get_cuda_rng_tracker().get_states(),
        },
    }


@torch.no_grad()
def restore(engine: Engine, state: dict) -> None:
    """Put back what `capture` took, on the same layout.

    Raises:
        KeyError, RuntimeError: the state is of another model or layout (checked earlier, from the manifest).
    """
    for name, tensor in _weights(engine).items():
        tensor.copy_(state["weights"][name])
    moments = base_state(engine)
    for tensor, master, saved in zip(_updated(engine), state["masters"], state["moments"], strict=True):
        tensor.copy_(master)
        moments[tensor] = {
            name: value.to(tensor.device) if torch.is_tensor(value) else value for name, value in saved.items()
        }
    rng = state["rng"]
    random.setstate(rng["python"])
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    get_cuda_rng_tracker().set_states(rng["megatron"])
