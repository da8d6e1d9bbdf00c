"""Options of the 2:4 squared ReLU, and the checks that all implementations share.

Shapes: `f` features (the last dimension of z), `r_in` and `r_out` input and output width of the core.
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
    """Pruning, its gradient, and what is kept for the backward pass.

    With ρ = relu(z), K the two largest of a group of four consecutive features and t its third largest:

    Args:
        sparse: whether to prune; False gives plain `ρ²` (the dense warm-up) and ignores method, gradient and scale.
        method: `magnitude` gives `ρ²` on K; `soft_threshold` gives `scale · (ρ − t)²` on K; both give 0 elsewhere.
        gradient: `masked` is the exact gradient of the pruned function; `ste` is the straight-through estimator,
            `dz = 2ρ·ds` everywhere (`2ρ·scale·ds` for `soft_threshold`).
        scale: β of `soft_threshold`, finite and above 0; ignored by `magnitude`.
        ffn_memory: `eager` saves what autograd saves; `compressed` keeps the two kept values of four and their
            positions; `fused` keeps nothing f wide and computes z twice (for `relu2_24` alone: as compressed).
        backward: `dense` computes weight gradients from all of s and dz; `split` prunes both along tokens as well
            (plain/split.py; requires `ffn_core` with eager memory, magnitude and masked).

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
    """Check what every implementation requires of the activation z.

    Args:
        dtype: of z.
        features: f, the size of its last dimension on this rank.
        options: with `sparse`, f must be a multiple of 4.

    Raises:
        UserError: a dtype other than fp64, fp32 and bf16.
        ConfigError: f is not a multiple of 4.
    """
    if dtype == torch.float16:
        raise UserError("relu2_24 does not support float16: relu² overflows above 256; use bfloat16 or float32")
    if dtype not in DTYPES:
        raise UserError(f"relu2_24 does not support {dtype}; use bfloat16, float32 or float64")
    if options.sparse and features % 4:
        raise ConfigError("features", features, "does not split into groups of 4", "give a multiple of 4 on each rank")


def check_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options) -> None:
    """Check the operands: `u [..., r_in]`, `m_up [f, r_in]`, `n_down [r_out, f]`, all of one dtype.

    Raises:
        UserError: shapes or dtypes that do not match, or a dtype that `check_activation` refuses.
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
