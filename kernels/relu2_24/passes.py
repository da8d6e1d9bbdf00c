"""`ffn_core` as one autograd function around the two passes of an implementation, which contains no autograd itself.

Shapes: `f` features, `n` tokens, `r_in` and `r_out` input and output width of the core.

An implementation of `fused` or `compressed` memory is a `Passes`: a forward pass that also returns the tensors to keep,
and a backward pass that receives them. Both see tokens as rows and run without a graph. This file adds leading
dimensions, saving, skipping of unneeded gradients, and the error for second derivatives.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from elas.kernels.relu2_24.autocast import autocast_off
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.reference import first_derivative_only, no_forward_mode

Kept = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]
"""Which of the operands require a gradient."""


class Operands(NamedTuple):
    """The operands of the core.

    Attributes:
        u: `[n, r_in]`.
        m_up: `[f, r_in]`.
        n_down: `[r_out, f]`.
    """

    u: Tensor
    m_up: Tensor
    n_down: Tensor


class Passes(Protocol):
    """The two passes of one implementation; operands have one dtype and device, any strides, any number of tokens.

    The layout of the kept tensors depends on `ffn_memory` alone: none for `fused`; for `compressed` those of
    `plain.compressed.compress`, `[n, …]`; for `eager` (the split backward) ρ `[n, f]`.
    """

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """A new `v [n, r_out]`, and the tensors to keep, if `keep`."""
        ...

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """`dv [n, r_out]` → new du, dm_up, dn_down, None where `needs` is False; at least one is True."""
        ...


def transformed() -> bool:
    """Whether this runs inside a transform of `torch.func`, where `requires_grad` does not show what is wanted.

    torch has no public name for this; its own `autograd.Function.apply` calls the same function.
    """
    return torch._C._are_functorch_transforms_active()


def _rows(x: Tensor) -> Tensor:
    """`[..., r]` as `[n, r]`; `reshape(-1, r)` fails on tensors without elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _Core(torch.autograd.Function):
    """The two passes of an implementation; saves u, the factors and the kept tensors."""

    jvp = staticmethod(no_forward_mode)  # Dynamo does not trace a function with a jvp; it uses compiled.py

    @staticmethod
    def forward(ctx, u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, passes: Passes) -> Tensor:
        v, kept = passes.forward(Operands(_rows(u), m_up, n_down), options, True)
        ctx.options, ctx.passes = options, passes
        ctx.save_for_backward(u, m_up, n_down, *kept)
        return v.view(*u.shape[:-1], n_down.shape[0])

    @staticmethod
    @first_derivative_only
    def backward(ctx, dv: Tensor) -> tuple[Tensor | None, ...]:
        u, m_up, n_down, *kept = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        if is_legacy_batchedtensor(dv):  # from `is_grads_batched`; only the operator supports it
            from elas.kernels.relu2_24 import compiled  # it imports this file

            kept += [u.new_empty(0) for _ in range(2 - len(kept))]
            how = compiled.how_of(ctx.options, "auto")
            du, dm_up, dn_down = compiled.backward_through((_rows(u), m_up, n_down, *kept), _rows(dv), needs, how)
            return None if du is None else du.view(u.shape), dm_up, dn_down, None, None
        with autocast_off(dv.device):  # `backward()` may be called inside an autocast region
            operands = Operands(_rows(u), m_up, n_down)
            du, dm_up, dn_down = ctx.passes.backward(operands, tuple(kept), _rows(dv), ctx.options, needs)
        return None if du is None else du.view(u.shape), dm_up, dn_down, None, None


def differentiable(passes: Passes) -> Callable[[Tensor, Tensor, Tensor, Relu24Options], Tensor]:
    """`core(u [..., r_in], m_up, n_down, options) -> v [..., r_out]` from two passes; differentiable once."""

    def core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options) -> Tensor:
        wanted = u.requires_grad or m_up.requires_grad or n_down.requires_grad
        # Inside `forward_ad.dual_level` use the function too: it raises, where the passes would drop tangents silently.
        if (torch.is_grad_enabled() and wanted) or torch.autograd.forward_ad._current_level >= 0:
            return _Core.apply(u, m_up, n_down, options, passes)
        operands = Operands(_rows(u.detach()), m_up.detach(), n_down.detach())
        v, _ = passes.forward(operands, options, False)
        return v.view(*u.shape[:-1], n_down.shape[0])

    return core
