"""Options of the 2:4 squared ReLU, and the checks every implementation shares.

Shapes: `f` features (the last dimension of z), `r_in`, `r_out` widths of the two ends of the core.
"""

import math
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import Tensor

from elas.config.pruning import Backward, FfnMemory, Gradient, Method, check_split
from elas.errors import ConfigError, UserError

CHOICES = {"method": Method, "gradient": Gradient, "ffn_memory": FfnMemory, "backward": Backward}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Relu24Options:
    """What is pruned, how the gradient passes, and what is kept for the backward pass.

    With ρ = relu(z), K the two largest of a group of four consecutive features and t its third largest:

    Args:
        sparse: prune; False gives plain `ρ²` (the dense warm-up) and ignores method, gradient and scale.
        method: `magnitude` gives `ρ²` on K; `soft_threshold` gives `scale · (ρ − t)²` on K; both 0 elsewhere.
        gradient: `masked` is the exact gradient of the pruned function; `ste` goes straight through the pruning,
            `dz = 2ρ·ds` everywhere (`2ρ·scale·ds` for `soft_threshold`).
        scale: β of `soft_threshold`, finite and above 0; `magnitude` does not look at it.
        ffn_memory: `eager` leaves saving to autograd; `compressed` keeps the two kept values of four and their
            positions; `fused` keeps nothing f wide and computes z twice (alone, without products: as compressed).
        backward: `dense` weight gradients see all of s and dz; `split` prunes both along tokens as well (split.py;
            `ffn_core` with eager memory, magnitude and masked).

    Raises:
        ConfigError: a value outside these, or options that do not go together.
    """

    sparse: bool = True
    method: Method = "magnitude"
    gradient: Gradient = "masked"
    scale: float = 1.0
    ffn_memory: FfnMemory = "fused"
    backward: Backward = "dense"

    @classmethod
    def of(cls, sparsity, *, sparse: bool) -> "Relu24Options":
        """From the configuration's `sparsity` section (`elas.config.SparsityConfig`), with pruning on or off."""
        names = (field.name for field in fields(cls) if field.name != "sparse")
        return cls(sparse=sparse, **{name: getattr(sparsity, name) for name in names})

    def __post_init__(self):
        if not isinstance(self.sparse, bool):
            raise ConfigError("sparse", self.sparse, "is not a boolean", "use True or False")
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            if value not in get_args(choices):
                raise ConfigError(key, value, "is not a choice", f"use {' | '.join(get_args(choices))}")
        check_split(self)
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not (number and math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError("scale", self.scale, "is not a finite number above 0", "use 0.5 to 2, such as 1.0")


def check_activation(dtype: torch.dtype, features: int, options: Relu24Options) -> None:
    """Refuse what no implementation takes.

    Args:
        dtype: of the activation z.
        features: `f`, the size of its last dimension on this rank.
        options: a group of four must be whole when `options.sparse`.

    Raises:
        UserError: for a dtype other than fp64, fp32 and bf16.
        ConfigError: when `f` does not divide by 4 and `options.sparse`.
    """
    if dtype == torch.float16:
        raise UserError("relu2_24 does not take float16: relu² overflows above 256; use bfloat16 or float32")
    if dtype not in DTYPES:
        raise UserError(f"relu2_24 does not take {dtype}; use bfloat16, float32 or float64")
    if options.sparse and features % 4:
        raise ConfigError("features", features, "does not split into groups of 4", "give a multiple of 4 on each rank")


def check_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options) -> None:
    """Refuse factors that do not fit: `u [..., r_in]`, `m_up [f, r_in]`, `n_down [r_out, f]`, one dtype for the three.

    Raises:
        UserError: shapes or dtypes that do not fit, or a dtype `check_activation` refuses.
        ConfigError: see `check_activation`.
    """
    shapes = f"u {list(u.shape)}, m_up {list(m_up.shape)}, n_down {list(n_down.shape)}"
    if not (u.dim() >= 1 and m_up.dim() == n_down.dim() == 2):
        raise UserError(f"ffn_core takes u [..., r_in] and two matrices, got {shapes}; flatten the factors")
    if u.shape[-1] != m_up.shape[1] or m_up.shape[0] != n_down.shape[1]:
        raise UserError(f"ffn_core takes u [..., r_in], m_up [f, r_in], n_down [r_out, f], got {shapes}; transpose one")
    if not u.dtype == m_up.dtype == n_down.dtype:
        raise UserError(f"ffn_core takes one dtype, got {u.dtype}, {m_up.dtype}, {n_down.dtype}; cast them to one")
    check_activation(u.dtype, m_up.shape[0], options)
