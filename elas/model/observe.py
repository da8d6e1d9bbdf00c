"""Statistics of 2:4 by layer, on a sample of tokens; cheap enough for every logged step.

Counts can be added over layers, tensor-parallel shards and data-parallel ranks; ratios are computed at the end.
Columns of a layer's counts:

    values     sampled values of relu(z)²                  zeros      zeros among them before pruning
    dropped    non-zeros that 2:4 sets to 0                magnitude  sum of relu(z)²; `lost`: of the dropped values
    kept       values that 2:4 kept at the previous look   flipped    of these, dropped by the current weights

Flips are counted on the inputs of the previous look, so they measure the change of the weights since, not of the data.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from elas import accelerator
from elas.kernels.relu2_24 import activation_stats
from elas.kernels.relu2_24.pack import keep_mask

Project = Callable[[torch.Tensor], torch.Tensor]
COLUMNS = ("values", "zeros", "dropped", "magnitude", "lost", "kept", "flipped")
WATCHED_TOKENS = 128
"""Tokens whose masks are compared between two looks; their inputs and masks are kept in between."""


class Observer:
    """Measures one squared ReLU on request.

    Attributes:
        layer: index of the layer in the whole model.
        tokens: number of tokens to sample in the next pass; 0 for none.
        counts: fp64 `[len(COLUMNS)]` of the last sampled pass, on its device; None before.
    """

    def __init__(self):
        self.layer = 0
        self.tokens = 0
        self.counts: torch.Tensor | None = None
        self._watched: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def look(self, x: torch.Tensor, project: Project | None, sparse: bool) -> None:
        """Count, if `tokens` is not 0, and set it to 0.

        Args:
            x: `[..., f]` pre-activation, or with `project` the layer's input.
            project: maps rows of x to their pre-activation `[rows, f]` with the current weights. Masks are compared
            from
                the layer's input, since LORO's exact steps rotate the vector between two factors.
            sparse: whether 2:4 is on; otherwise nothing is dropped, and masks are not compared.
        """
        if not self.tokens:
            return
        sample = x.reshape(-1, x.shape[-1])
        sample = sample[:: max(1, -(-sample.shape[0] // self.tokens))]  # spread over the whole batch
        z = _whole(sample if project is None else project(sample))
        z = z[..., : z.shape[-1] // 4 * 4]
        zeros, nonzeros, dropped = activation_stats(z)
        none = torch.zeros_like(zeros)
        magnitude, lost, kept, flipped = none, none, none, none
        if sparse:
            a = z.relu().float().square()
            keep = keep_mask(z.relu())
            magnitude, lost = a.sum(), torch.where(keep, 0, a).sum()
            if project is not None:
                kept, flipped = self._compare(sample, project, keep & (z > 0), none)
        counts = [zeros + nonzeros, zeros, dropped if sparse else none, magnitude, lost, kept, flipped]
        self.counts = torch.stack([one.to(torch.float64) for one in counts])  # no `.item()`: it would break a graph
        self.tokens = 0

    def _compare(
        self, sample: torch.Tensor, project: Project, keep: torch.Tensor, none: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before, self._watched = self._watched, (sample[:WATCHED_TOKENS].clone(), keep[:WATCHED_TOKENS].clone())
        if before is None:
            return none, none
        inputs, mask = before
        z = _whole(project(inputs))[..., : mask.shape[-1]]
        return mask.sum(), (mask & ~keep_mask(z.relu())).sum()


def _whole(z: Any) -> torch.Tensor:
    """A DTensor gathered, so that every rank counts all features; other tensors unchanged."""
    tensor: Any = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return z if tensor is None or not isinstance(z, tensor.DTensor) else z.full_tensor()


def observers(models: Iterable[torch.nn.Module]) -> list[Observer]:
    """The observers of all squared ReLUs in these chunks, wrapped (by DDP) or not, with their `layer` set."""
    found = []
    layers: list[Any] = [module for model in models for module in model.modules() if _is_layer(module)]
    for layer in layers:
        for module in layer.modules():
            observer = getattr(module, "observer", None)
            if isinstance(observer, Observer):
                observer.layer = layer.layer_number - 1
                found.append(observer)
    return found


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether it is a transformer layer; attention has a `layer_number` too."""
    return hasattr(module, "layer_number") and hasattr(module, "mlp")


def look_next(models: Iterable[torch.nn.Module], tokens: int) -> None:
    """Sample up to `tokens` tokens of the next forward pass; 0 cancels."""
    for observer in observers(models):
        observer.tokens, observer.counts = tokens, None


def sum_over_ranks(models: Iterable[torch.nn.Module], layers: int) -> torch.Tensor:
    """Counts of every layer of the whole model: fp64 `[layers, len(COLUMNS)]`; every rank must call it."""
    total = torch.zeros(layers, len(COLUMNS), dtype=torch.float64, device=accelerator.device())
    for observer in observers(models):
        if observer.counts is not None:
            total[observer.layer] += observer.counts
    dist.all_reduce(total)
    return total.cpu()


def shares(counts: torch.Tensor) -> dict[str, float | None]:
    """Ratios from one row of counts or a sum of rows; None where nothing was counted.

    Returns:
        `sparsity`: share of zeros in relu(z)²; `dropped`: share of its non-zeros that 2:4 drops; `dropped_magnitude`:
        their share of the sum of relu(z)²; `mask_flips`: share of the values kept at the previous look that are now
        dropped.
    """
    one = dict(zip(COLUMNS, counts.tolist(), strict=True))
    nonzeros = one["values"] - one["zeros"]
    return {
        "sparsity": one["zeros"] / one["values"] if one["values"] else None,
        "dropped": (one["dropped"] / nonzeros if nonzeros else 0.0) if one["values"] else None,
        "dropped_magnitude": one["lost"] / one["magnitude"] if one["magnitude"] else None,
        "mask_flips": one["flipped"] / one["kept"] if one["kept"] else None,
    }


def by_layer(counts: torch.Tensor) -> dict[str, list[float | None]]:
    """`shares` of every layer, as a list for each ratio, rounded to 5 digits."""
    rows = [shares(row) for row in counts]
    return {key: [None if (x := row[key]) is None else round(x, 5) for row in rows] for key in rows[0]}
