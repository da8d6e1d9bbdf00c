"""What 2:4 does to the activations of a model, in one `with`."""

import contextlib
from collections.abc import Iterator

import torch

from elas.errors import ConfigError, UserError
from elas.model.activation import SparseSwitch
from elas.model.observe import by_layer, shares
from elas.nn.settings import check_count


@contextlib.contextmanager
def observe(model: torch.nn.Module, tokens: int = 1024) -> Iterator[dict]:
    """Look at the squared ReLUs that run inside the block.

        with observe(model) as seen:
            loss = model(batch)
        seen["dropped"], seen["layers"]["dropped"]

    Args:
        model: any model with layers of `elas.nn` (or of `elas.model`).
        tokens: how many tokens of the first forward pass to look at, in each layer.

    Yields:
        A dict that is filled when the block ends, from this process's tokens: `sparsity`, the share of zeros after
        relu²; `dropped`, of its non-zeros, those that 2:4 drops; `dropped_magnitude`, their share of the sum of relu²;
        `mask_flips`, of what the look before kept (on its own inputs), what is dropped by now, None at the first
        look; and `layers`, the same by layer in order of modules.

    Raises:
        ConfigError: a number of tokens that is none, or a model without a squared ReLU.
        UserError: no squared ReLU ran in the block.
    """
    check_count("tokens", tokens, "give a number of tokens, such as 1024")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError("model", type(model).__name__, "is not a model", "give a torch.nn.Module")
    relu2 = [one for one in model.modules() if isinstance(one, SparseSwitch) and one.is_relu2]
    watched = [one.observer for one in relu2]
    if not watched:
        fix = 'observe one with LowRankFFN or SparseFFN of activation="relu2", or leave it out'
        raise ConfigError("model", type(model).__name__, "has no squared ReLU of elas.nn to look at", fix)
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
