"""The operation in plain autograd: it defines the result that other implementations are tested against.

Shapes: `f` features, `g = f / 4` groups, `r_in` and `r_out` input and output width of the core; ρ = relu(z).

Pruning ranks ρ, not ρ²: squaring in bf16 makes ties, and otherwise the masks are the same. NaN is never hidden: relu
keeps it and it ranks as +inf, so a group with a NaN keeps a NaN (or two infinities that precede it). The gradient at a
dropped NaN or infinity (the third of its group) is not defined by this file; here it is 0 · NaN.

Saved for the backward pass, in units of one bf16 activation and without z: dense 1.0 (ρ), masked magnitude 1.5 (ρ and a
bool mask), ste 1.0 (ρ), masked soft threshold 3.0 (ρ, ρ − t, two masks); the product with n_down saves s, another 1.0.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.pack import keep_and_third, keep_mask, split_last

NO_SECOND = (
    "relu2_24 has no second derivative in fused or compressed memory or with ste: leave create_graph out, "
    "or use ffn_memory eager with gradient masked"
)
NO_FORWARD_MODE = (
    "relu2_24 has no forward mode (jvp, jacfwd, hessian) in fused or compressed memory or with ste: "
    "use ffn_memory eager with gradient masked"
)


def no_forward_mode(ctx: Any, *_: Any) -> Any:
    """The `jvp` of autograd functions; the error of torch's own asks the author of the function to write one."""
    raise NotImplementedError(NO_FORWARD_MODE)


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the backward of an autograd function: it raises if it is to be differentiated itself.

    PyTorch's `once_differentiable` raises only if the incoming gradient has a graph. After `loss.sum()` it has none,
    and a second derivative would silently miss the terms from the saved activation.
    """

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        return backward(ctx, *grads)

    return checked


class _NoSecond(torch.autograd.Function):
    """`dz`, whose derivative raises; `anchor` makes it depend on z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dz: Tensor, anchor: Tensor) -> Tensor:
        return dz.view_as(dz)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(NO_SECOND)


def anchor_of(z: Tensor) -> Tensor:
    """An empty tensor with the graph of z: the result of a backward pass can depend on z without keeping z."""
    return z[..., :0].clone()


def no_second(dz: Tensor, anchor: Tensor) -> Tensor:
    """`dz`, which raises if it is differentiated; `torch.func` builds a graph of every backward pass, used or not."""
    return _NoSecond.apply(dz, anchor) if torch.is_grad_enabled() else dz


class _StraightThrough(torch.autograd.Function):
    """The value of `s` with the gradient of `a`; `anchor` is from `anchor_of(a)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, s: Tensor, anchor: Tensor) -> Tensor:
        return s.view_as(s)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, ds: Tensor) -> tuple[Tensor, None, None]:
        return no_second(ds, *ctx.saved_tensors), None, None


class _StraightThroughUntraced(_StraightThrough):
    jvp = staticmethod(no_forward_mode)  # a separate class, since Dynamo does not trace functions with a jvp


def prune_magnitude(rho: Tensor, keep: Tensor) -> Tensor:
    """`ρ²` where kept, else 0: `[..., f]` in the dtype of `rho [..., f]`; keep is bool `[..., f]`."""
    return torch.where(keep, rho.square(), 0)


def prune_soft_threshold(rho: Tensor, keep: Tensor, third: Tensor, scale: float) -> Tensor:
    """`scale · (ρ − t)²` where kept, else 0: `[..., f]` in the dtype of `rho [..., f]`; two bool masks `[..., f]`.

    t is ρ at the third. Derivative: `d_i = 2·scale·(ρ_i − t)` at the kept two, `−Σ d_i` at the third. Of equal values
    the one with the higher index ranks lower (pack.py), which makes the third unique.
    """
    t = split_last(torch.where(third, rho, 0), 4).sum(-1, keepdim=True)
    excess = (split_last(rho, 4) - t).flatten(-2)
    # Mask before squaring: otherwise a dropped infinity gives a gradient of 0 · inf = NaN.
    return scale * torch.where(keep, excess, 0).square()


def prune(rho: Tensor, options: Relu24Options) -> Tensor:
    """s of `rho [..., f]` by `options.method`; plain `ρ²` if not `options.sparse`. Differentiable by autograd."""
    if not options.sparse:
        return rho.square()
    if options.method == "magnitude":
        return prune_magnitude(rho, keep_mask(rho))
    return prune_soft_threshold(rho, *keep_and_third(rho), options.scale)


def relu2_24(z: Tensor, options: Relu24Options) -> Tensor:
    """`s = prune(relu(z)²)`, differentiable once (ste) or any number of times (masked).

    Args:
        z: `[..., f]`, fp64, fp32 or bf16, f % 4 == 0 if `options.sparse`.
        options: `ffn_memory` is ignored.

    Returns:
        s: shape and dtype of z.

    Source: arXiv 2605.03667 (relu², 2:4 along the features of a token), arXiv 2503.16672.
    """
    rho = z.relu()
    if not options.sparse or options.gradient == "masked":
        return prune(rho, options)
    scale = options.scale if options.method == "soft_threshold" else 1.0
    run = _StraightThrough if torch.compiler.is_compiling() else _StraightThroughUntraced
    return run.apply(scale * rho.square(), prune(rho.detach(), options), anchor_of(rho))


def ffn_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options) -> Tensor:
    """`v = prune(relu²(u m_upᵀ)) n_downᵀ`: `u [..., r_in]`, `m_up [f, r_in]`, `n_down [r_out, f]`, `v [..., r_out]`."""
    return linear(relu2_24(linear(u, m_up), options), n_down)


@torch.no_grad()
def activation_stats(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count zeros of `relu(z)²` before pruning, and the non-zeros that 2:4 would drop.

    Args:
        z: `[..., f]`, any floating dtype; a last group of fewer than four features counts as a group.

    Returns:
        int64 0-dim `(zeros, nonzeros, dropped)`: zeros and non-zeros of `relu(z)²` (NaN is a non-zero), and the
        non-zeros beyond two in their group.
    """
    nonzero = z.relu().square() != 0
    count = nonzero.sum()
    groups = split_last(pad(nonzero, (0, -z.shape[-1] % 4)), 4)
    dropped = (groups.sum(-1) - 2).clamp_min(0).sum()
    return nonzero.numel() - count, count, dropped
