"""`ffn_core` as one autograd function around two plain passes, so that an implementation writes no autograd.

Shapes: `f` features, `n` tokens, `r_in`, `r_out` widths of the two ends of the core.

An implementation of `fused` or `compressed` memory is a `Passes`: a forward that also gives what to keep, and a
backward that takes it back. Both see tokens as rows and run without a graph. Here they get leading shapes, saving,
skipping of gradients that are not needed, and the refusal of second derivatives.
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
"""Which of the operands' gradients are wanted."""


class Operands(NamedTuple):
    """What the core multiplies.

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

    What is kept has a layout of its `ffn_memory`, the same in every implementation: nothing for `fused`,
    `plain.compressed.compress`'s tensors, `[n, …]`, for `compressed`, ρ `[n, f]` for `eager` (the split backward).
    """

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """New `v [n, r_out]`, and what to keep if `keep`."""
        ...

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """`dv [n, r_out]` → new du, dm_up, dn_down, None where `needs` is False; at least one is needed."""
        ...


def transformed() -> bool:
    """Whether this runs under a transform of `torch.func`, where no tensor says whether a gradient of it is wanted.

    torch has no public name for this; its own `autograd.Function.apply` asks the same.
    """
    return torch._C._are_functorch_transforms_active()


def _rows(x: Tensor) -> Tensor:
    """`[..., r]` as `[n, r]`, also where there are no tokens or no features to infer n from."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _Core(torch.autograd.Function):
    """The two passes of an implementation, keeping u, the factors and what the forward pass says."""

    jvp = staticmethod(no_forward_mode)  # Dynamo traces no function with a jvp; it sees the operator of compiled.py

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
        if is_legacy_batchedtensor(dv):  # of `is_grads_batched`: only the operator takes it
            from elas.kernels.relu2_24 import compiled  # which imports this file

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
        # Within `forward_ad.dual_level` the function refuses; without it tangents would be lost in silence.
        if (torch.is_grad_enabled() and wanted) or torch.autograd.forward_ad._current_level >= 0:
            return _Core.apply(u, m_up, n_down, options, passes)
        operands = Operands(_rows(u.detach()), m_up.detach(), n_down.detach())
        v, _ = passes.forward(operands, options, False)
        return v.view(*u.shape[:-1], n_down.shape[0])

    return core
