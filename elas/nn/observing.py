"""`observe`: statistics of 2:4 in a model, by a `with` block."""

import contextlib
from collections.abc import Iterator

import torch

from elas.errors import ConfigError, UserError
from elas.model.activation import SparseSwitch
from elas.model.observe import by_layer, shares
from elas.nn.settings import check_count


@contextlib.contextmanager
def observe(model: torch.nn.Module, tokens: int = 1024) -> Iterator[dict]:
    """Measure the squared ReLUs that run inside the block.

        with observe(model) as seen:
            loss = model(batch)
        seen["dropped"], seen["layers"]["dropped"]

    Args:
        model: any model with layers of `elas.nn` (or of `elas.model`).
        tokens: number of tokens of the first forward pass to sample in each layer.

    Yields:
        A dict that is filled at the end of the block from this process's tokens: `sparsity`, the share of zeros after
        relu²; `dropped`, the share of its non-zeros that 2:4 drops; `dropped_magnitude`, their share of the sum of
        relu²; `mask_flips`, the share of the values kept in the previous block that the current weights drop on the
        same inputs, None in the first block; and `layers`, the same by layer in the order of modules.

    Raises:
        ConfigError: an invalid number of tokens, or a model without a squared ReLU.
        UserError: no squared ReLU ran in the block.
    """
    check_count("tokens", tokens, "give a number of tokens, such as 1024")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError("model", type(model).__name__, "is not a model", "give a torch.nn.Module")
    relu2 = [one for one in model.modules() if isinstance(one, SparseSwitch) and one.is_relu2]
    watched = [one.observer for one in relu2]
    if not watched:
        fix = 'observe a model with a LowRankFFN or SparseFFN of activation="relu2", or leave it out'
        raise ConfigError("model", type(model).__name__, "has no squared ReLU of elas.nn", fix)
    for one in watched:
        one.tokens, one.counts = tokens, None
    seen: dict = {}
    try:
        yield seen
    finally:
        for one in watched:
            one.tokens = 0
    counts = [one.counts.cpu() for one in watched if one.counts is not None]
    if not counts:
        raise UserError("observe saw no squared ReLU: run the model's forward pass inside the block")
    layers = torch.stack(counts)
    seen |= {**shares(layers.sum(0)), "layers": by_layer(layers)}
