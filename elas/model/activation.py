"""Non-linearities as modules that can turn their 2:4 sparsity on and off, and count what it drops.

The switch is one Boolean a module, set for the whole model by `set_sparse` when `sparsity.dense_steps` have passed.
Counting is asked for by `count_sparsity` before a step that will be logged and read by `sparsity_counts` after it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from elas.kernels.relu2_24 import Relu24Options, activation_stats, relu2_24
from elas.model.transformer_config import ElasTransformerConfig


class SparseSwitch(torch.nn.Module):
    """Holds whether 2:4 is active, and the counts of one forward pass.

    `counts` is an int64 tensor `[values, zeros, dropped]` after a counted pass, else None.
    """

    def __init__(self, config: ElasTransformerConfig):
        super().__init__()
        sparsity = config.sparsity
        self._options = {flag: Relu24Options.of(sparsity, sparse=flag) for flag in (False, True)}
        self.can_be_sparse = sparsity.kind == "2:4"
        self.sparse = self.can_be_sparse and sparsity.dense_steps == 0
        self.tokens_to_count = 0
        self.counts: torch.Tensor | None = None

    @property
    def options(self) -> Relu24Options:
        """The kernel's options as of now."""
        return self._options[self.sparse]

    @torch.no_grad()
    def count(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Count zeros and dropped values once, if asked to.

        Args:
            x: `[..., f]` pre-activation, or with `weight [f, r]` the `[..., r]` input of the projection to it.
            weight: see x.
        """
        if not self.tokens_to_count:
            return
        tokens = x.reshape(-1, x.shape[-1])
        tokens = tokens[:: max(1, -(-tokens.shape[0] // self.tokens_to_count))]  # spread over the whole batch
        z = tokens if weight is None else F.linear(tokens, weight)
        zeros, nonzeros, dropped = (int(v) for v in activation_stats(z[..., : z.shape[-1] // 4 * 4]))
        self.counts = torch.tensor([zeros + nonzeros, zeros, dropped if self.sparse else 0])
        self.tokens_to_count = 0


class Activation(SparseSwitch):
    """An element-wise non-linearity: `silu`, or `relu2` with 2:4 when that is active."""

    def __init__(self, config: ElasTransformerConfig, kind: str):
        super().__init__(config)
        self.kind = kind
        if kind != "relu2":
            self.can_be_sparse = self.sparse = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., f]` to the same shape and dtype."""
        if self.kind == "silu":
            return F.silu(x)
        self.count(x)
        return relu2_24(x, self.options)


def _switches(models: Iterable[torch.nn.Module]) -> list[SparseSwitch]:
    return [m for model in models for m in model.modules() if isinstance(m, SparseSwitch)]


def set_sparse(models: Iterable[torch.nn.Module], active: bool) -> None:
    """Turn 2:4 on or off in every layer that has it."""
    for switch in _switches(models):
        switch.sparse = active and switch.can_be_sparse


def count_sparsity(models: Iterable[torch.nn.Module], tokens: int) -> None:
    """Ask every squared ReLU to count on up to `tokens` tokens of its next forward pass; 0 cancels."""
    for switch in _switches(models):
        switch.tokens_to_count = tokens
        switch.counts = None


def sparsity_counts(models: Iterable[torch.nn.Module]) -> torch.Tensor:
    """Sum of the counts on this rank, int64 `[values, zeros, dropped]`."""
    counts = [switch.counts for switch in _switches(models) if switch.counts is not None]
    return torch.stack(counts).sum(0) if counts else torch.zeros(3, dtype=torch.int64)
