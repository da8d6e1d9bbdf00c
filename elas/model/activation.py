"""Non-linearities as modules that can turn their 2:4 sparsity on and off.

The switch is one Boolean a module, set for the whole model by `set_sparse` when `sparsity.dense_steps` have passed.
What it does to the activation is seen by `elas.model.observe`.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from elas.kernels.relu2_24 import Relu24Options, relu2_24
from elas.model.observe import Observer
from elas.model.transformer_config import ElasTransformerConfig


class SparseSwitch(torch.nn.Module):
    """Holds whether 2:4 is active, and an observer of what it does."""

    def __init__(self, config: ElasTransformerConfig):
        super().__init__()
        sparsity = config.sparsity
        self._options = {flag: Relu24Options.of(sparsity, sparse=flag) for flag in (False, True)}
        self.can_be_sparse = sparsity.kind == "2:4"
        self.sparse = self.can_be_sparse and sparsity.dense_steps == 0
        self.observer = Observer()

    @property
    def options(self) -> Relu24Options:
        """The kernel's options as of now."""
        return self._options[self.sparse]


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
        self.observer.look(x, None, self.sparse)
        return relu2_24(x, self.options)


def _switches(models: Iterable[torch.nn.Module]) -> list[SparseSwitch]:
    return [m for model in models for m in model.modules() if isinstance(m, SparseSwitch)]


def set_sparse(models: Iterable[torch.nn.Module], active: bool) -> None:
    """Turn 2:4 on or off in every layer that has it."""
    for switch in _switches(models):
        switch.sparse = active and switch.can_be_sparse
