"""Linears that pass their weight to a function for one call, so that one operation can use the weights of two modules.

Legend: s sequence, b batch, f d_ff, r width of the input (h at full rank).

The core of the FFN, `v = prune(relu²(u·m_upᵀ))·n_downᵀ`, is such an operation. A weight may be used only during a
call of its own module: hooks gather it before the call (FSDP2, Megatron's overlapped parameter gather) and may free it
after. So no module reads the weight of another. Each linear receives a function, `core`, and calls it with its weight;
the call of fc2 is inside that of fc1:

    linear_fc1(x, core=lambda u, m_up: linear_fc2(u, core=lambda u, n_down: ffn_core(u, m_up, n_down)))
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from elas.errors import UserError

Core = Callable[[torch.Tensor, torch.Tensor], Any]
"""Called with an input and a weight, both local to this rank; returns a tensor, or what the caller's core returns."""


class Pairs:
    """Mixin of `torch.nn.Module`s that names a linear's factor pairs, one for each of its `outputs`.

    Attributes:
        outputs: output width of each pair, by name: q, k and v, or gate and up. Weights of a single pair have no name.
    """

    outputs: dict[str, int]

    def _name(self, what: str, pair: str) -> str:
        return what if len(self.outputs) == 1 else f"{what}_{pair}"

    @property
    def output_factors(self) -> list[torch.nn.Parameter]:
        """`factor_out [o, r]` of each pair; this rank's `[o/t, r]` under tensor parallelism."""
        return [getattr(self, self._name("factor_out", name)) for name in self.outputs]

    @property
    def biases(self) -> list[torch.nn.Parameter | None]:
        """Bias `[o]` (`[o/t]`) of each pair, or None for each."""
        return [getattr(self, self._name("bias", name)) for name in self.outputs]


class _ContiguousGradient(torch.autograd.Function):
    """The identity with a contiguous gradient: Megatron's all-reduce silently reduces a copy of any other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """`x` itself."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """The same values, contiguous."""
        return gradient.contiguous()


def with_bias(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`u [..., r]` and `weight [f, r]` such that `u·weightᵀ` includes `bias [f]`.

    The core has no bias, so the bias becomes one more column of the weight, with an input of 1. Seven columns of zeros
    keep the width a multiple of 8, which matrix units require. Costs a copy of both.
    """
    if bias is None:
        return u, weight
    u = _ContiguousGradient.apply(u)
    one = F.pad(u.new_ones(*u.shape[:-1], 1), (0, 7))
    column = F.pad(bias[:, None], (0, 7))
    return torch.cat([u, one], dim=-1), torch.cat([weight, column], dim=-1)


def check_plain_call(place: str | None, config) -> None:
    """Refuse a plain call of fc1 where Megatron's own MLP would apply a squared ReLU without 2:4.

    Args:
        place: Megatron's name of the linear, `fc1` in an FFN.
        config: an `ElasTransformerConfig`.

    Raises:
        UserError: 2:4 is configured, and the FFN is Megatron's MLP with Megatron's activation.
    """
    if place != "fc1" or config.sparsity.kind == "none" or config.ffn_activation != "relu2":
        return
    if not config.use_te_activation_func:  # with it, Megatron's MLP runs `ElasSpecProvider.activation_func`
        raise UserError(
            "Megatron's own MLP has no 2:4; take the layers from elas.model.spec.layer_spec, or set "
            "use_te_activation_func=True with ElasSpecProvider's activation_func, or sparsity.kind to none"
        )
