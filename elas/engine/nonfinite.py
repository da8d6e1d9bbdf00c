"""Which layer made the numbers blow up: the batch once more, with every layer watched."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from elas.engine.engine import Engine
from elas.model.shards import global_names

_Found = tuple[tuple[int, int], str, str]
"""When it was met (weights, forward, backward; which layer), the layer, what of it."""


def name_bad_layer(engine: Engine) -> str:
    """Find the first layer with a number that is not finite; every rank calls it after a step that went bad.

    Looks at the weights, then at what the layers give in the forward pass of the same batch, then at the gradients
    that they get and pass on. Leaves gradients behind: nothing can be trained afterwards.

    Returns:
        For people, the same on every rank: `decoder.layers.3 (its output, on rank 2)`.
    """
    found = _bad_weights(engine) or _bad_in_passes(engine)
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    told = [(order, f"{name} ({what}, on rank {rank})") for rank, (order, name, what) in
            ((rank, one) for rank, one in enumerate(everybody) if one)]  # fmt: skip
    return min(told)[1] if told else "no layer when the batch was run again: the fault may be one of the hardware"


def _bad_weights(engine: Engine) -> _Found | None:
    for chunk in engine.chunks:
        for name, parameter in global_names(chunk).items():
            held = parameter.ds_tensor if engine.stage == 3 else parameter.data
            if held.numel() and not torch.isfinite(held).all():
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
            if not torch.isfinite(grad).all():  # layers come last first: the last one is where it began
                found.append(((2, -order), name, "the gradient of its output"))

        handles.append(module.register_forward_hook(forward))
    try:
        engine.pass_again()
    finally:
        for handle in handles:
            handle.remove()
    return min(found) if found else None


def _layers(engine: Engine) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Order in the whole model, global name and module of what this rank runs."""
    for chunk in engine.chunks:
        if chunk.pre_process:
            yield 0, "embedding", chunk.embedding
        for layer in chunk.decoder.layers:
            yield layer.layer_number, f"decoder.layers.{layer.layer_number - 1}", layer
        if chunk.post_process:
            yield 9_999, "output_layer", chunk.output_layer
