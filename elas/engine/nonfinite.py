"""Finds the layer that produced non-finite numbers, by running the batch again with hooks on every layer."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from elas.engine.engine import Engine
from elas.engine.zero import local_weights
from elas.model.shards import global_names

_Found = tuple[tuple[int, int], str, str]
"""Order (0 weights, 1 forward, 2 backward; then the layer's), the layer's name, what is not finite."""


def name_bad_layer(engine: Engine) -> str:
    """Find the first layer with a non-finite number; every rank must call it after a bad step.

    Checks the weights, then the layers' outputs in the forward pass of the same batch, then the gradients of these
    outputs. Leaves gradients behind, so training cannot continue.

    Returns:
        A description, the same on every rank: `decoder.layers.3 (its output, on rank 2)`.
    """
    found = _bad_weights(engine) or _bad_in_passes(engine)
    gathered: list[_Found | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    labels = []
    for rank, one in enumerate(gathered):
        if one is not None:
            order, name, what = one
            labels.append((order, f"{name} ({what}, on rank {rank})"))
    return min(labels)[1] if labels else "none when the batch was run again, so possibly a hardware fault"


def _bad_weights(engine: Engine) -> _Found | None:
    for chunk in engine.chunks:
        for name, parameter in global_names(chunk).items():
            weights = local_weights(parameter, engine.stage, engine.layout.dp_rank)
            if weights.numel() and not torch.isfinite(weights).all():
                return (0, 0), name, "its weights"
    return None


def _bad_in_passes(engine: Engine) -> _Found | None:
    found: list[_Found] = []
    handles = []
    for order, name, module in _layers(engine):

        def forward(_module, _inputs, output, order=order, name=name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not torch.is_tensor(tensor) or not tensor.is_floating_point():
                return
            if not torch.isfinite(tensor).all():
                found.append(((1, order), name, "its output"))
            elif tensor.requires_grad:
                tensor.register_hook(lambda grad: backward(grad, order, name))

        def backward(grad: torch.Tensor, order: int, name: str) -> None:
            if not torch.isfinite(grad).all():  # backward runs from the last layer, where the first bad one then is
                found.append(((2, -order), name, "the gradient of its output"))

        handles.append(module.register_forward_hook(forward))
    try:
        engine.pass_again()
    finally:
        for handle in handles:
            handle.remove()
    return min(found) if found else None


def _layers(engine: Engine) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Order in the whole model, global name and module of this rank's layers."""
    for chunk in engine.chunks:
        if chunk.pre_process:
            yield 0, "embedding", chunk.embedding
        layer: Any
        for layer in chunk.decoder.layers:
            yield layer.layer_number, f"decoder.layers.{layer.layer_number - 1}", layer
        if chunk.post_process:
            yield 9_999, "output_layer", chunk.output_layer
