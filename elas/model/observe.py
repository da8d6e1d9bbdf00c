"""What 2:4 does to the activation, layer by layer, on a sample of tokens: cheap enough to look at every logged step.

Counts are sums, so that layers, tensor-parallel shards and data-parallel ranks add up; ratios are taken at the end.
Columns of a layer's counts:

    values     sampled values of relu(z)²                zeros      of them 0 before any pruning
    dropped    non-zeros that 2:4 sets to 0              magnitude  sum of relu(z)², and `lost`: of the dropped ones
    kept       values that 2:4 kept at the look before   flipped    of them dropped by the weights of this look

Flips are of the same inputs, so they show the weights moving, not the data; they span the steps between two looks.
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
"""Tokens whose mask is compared between two looks: their inputs and masks are kept meanwhile."""


class Observer:
    """Looks at one squared ReLU when asked to.

    Attributes:
        layer: index of the layer in the whole model.
        tokens: how many tokens to look at in the next pass; 0 for none.
        counts: fp64 `[len(COLUMNS)]` after a pass that was looked at, on its device; else None.
    """

    def __init__(self):
        self.layer = 0
        self.tokens = 0
        self.counts: torch.Tensor | None = None
        self._watched: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def look(self, x: torch.Tensor, project: Project | None, sparse: bool) -> None:
        """Count once, if asked to.

        Args:
            x: `[..., f]` pre-activation, or with `project` the layer's input.
            project: from rows of x to their pre-activation `[rows, f]`, by the weights as they are; with factors, by
                both of them, as LORO's exact steps turn what lies between.
            sparse: whether 2:4 is on; without it nothing is dropped, and masks are not compared.
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
    """A DTensor gathered, so that every rank counts all features; others as they are."""
    tensor: Any = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return z if tensor is None or not isinstance(z, tensor.DTensor) else z.full_tensor()


def observers(models: Iterable[torch.nn.Module]) -> list[Observer]:
    """Those of every squared ReLU of these chunks, wrapped (by DDP) or not, knowing their layers."""
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
    """Whether it is a whole transformer layer (attention, too, knows its number)."""
    return hasattr(module, "layer_number") and hasattr(module, "mlp")


def look_next(models: Iterable[torch.nn.Module], tokens: int) -> None:
    """Ask for a look at up to `tokens` tokens of the next forward pass; 0 cancels."""
    for observer in observers(models):
        observer.tokens, observer.counts = tokens, None


def sum_over_ranks(models: Iterable[torch.nn.Module], layers: int) -> torch.Tensor:
    """Counts of every layer of the whole model: fp64 `[layers, len(COLUMNS)]`; every rank calls it."""
    total = torch.zeros(layers, len(COLUMNS), dtype=torch.float64, device=accelerator.device())
    for observer in observers(models):
        if observer.counts is not None:
            total[observer.layer] += observer.counts
    dist.all_reduce(total)
    return total.cpu()


def shares(counts: torch.Tensor) -> dict[str, float | None]:
    """Ratios of one row of counts (or of a sum of rows); None where nothing was counted.

    Returns:
        `sparsity`: zeros of relu(z)²; `dropped`: of its non-zeros, those that 2:4 drops; `dropped_magnitude`: their
        share of the sum of relu(z)²; `mask_flips`: of what was kept at the look before, what now is not.
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
    """`shares` of every layer, as one list for each, rounded to 5 digits."""
    rows = [shares(row) for row in counts]
    return {key: [None if (x := row[key]) is None else round(x, 5) for row in rows] for key in rows[0]}
