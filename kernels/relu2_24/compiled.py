"""`ffn_core` as one operator, so that torch.compile passes through it whole: `elas::relu2_24_core` and its backward.

The implementation is chosen when the operator runs, not when it is traced, so tracing neither builds an extension nor
logs. What is kept has the shapes that core.py's `Passes` promise for the memory mode, whichever implementation runs.
Eager mode does not come here: an operator written in Python costs some 20 µs more a call than an autograd function.
"""

import torch
from torch import Tensor

from elas.kernels.relu2_24 import registry
from elas.kernels.relu2_24.autocast import autocast_off
from elas.kernels.relu2_24.options import Relu24Options


def _options(sparse: bool, method: str, gradient: str, scale: float, ffn_memory: str, backward: str) -> Relu24Options:
    return Relu24Options(
        sparse=sparse, method=method, gradient=gradient, scale=scale, ffn_memory=ffn_memory, backward=backward
    )


def _two(tensors: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    """Up to two kept tensors, and empty ones in place of the missing: an operator's outputs are a fixed number."""
    return [*tensors, *(like.new_empty(0) for _ in range(2 - len(tensors)))]


@torch.library.custom_op("elas::relu2_24_core", mutates_args=())
def core(
    u: Tensor,
    m_up: Tensor,
    n_down: Tensor,
    sparse: bool,
    method: str,
    gradient: str,
    scale: float,
    ffn_memory: str,
    backward: str,
    implementation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`v [n, r_out]` from `u [n, r_in]`, and what the backward pass takes back."""
    options = _options(sparse, method, gradient, scale, ffn_memory, backward)
    one = registry.select(options, u.device, u.dtype, implementation)
    with autocast_off(u.device):
        v, kept = one.passes.forward(u, m_up, n_down, options, keep)
    return (v, *_two(kept, u))


@core.register_fake
def _(u, m_up, n_down, sparse, method, gradient, scale, ffn_memory, backward, implementation, keep):
    n, f = u.shape[0], m_up.shape[0]
    v = u.new_empty(n, n_down.shape[0])
    if not keep or ffn_memory == "fused":
        return (v, *_two((), u))
    if not sparse or gradient == "ste" or ffn_memory == "eager":
        return (v, *_two((u.new_empty(n, f),), u))
    groups = f // 4
    codes = (groups + 1) // 2 if method == "magnitude" else groups
    return v, u.new_empty(n, f // 2), u.new_empty(n, codes, dtype=torch.uint8)


@torch.library.custom_op("elas::relu2_24_core_backward", mutates_args=())
def core_backward(
    u: Tensor,
    m_up: Tensor,
    n_down: Tensor,
    kept0: Tensor,
    kept1: Tensor,
    dv: Tensor,
    sparse: bool,
    method: str,
    gradient: str,
    scale: float,
    ffn_memory: str,
    backward: str,
    implementation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`du`, `dm_up`, `dn_down`, empty where `needs` is False."""
    options = _options(sparse, method, gradient, scale, ffn_memory, backward)
    one = registry.select(options, u.device, u.dtype, implementation)
    packed = sparse and gradient == "masked" and ffn_memory == "compressed"
    kept = () if ffn_memory == "fused" else (kept0, kept1) if packed else (kept0,)
    with autocast_off(u.device):
        grads = one.passes.backward(u, m_up, n_down, kept, dv, options, tuple(needs))
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


@core_backward.register_fake
def _(u, m_up, n_down, kept0, kept1, dv, sparse, method, gradient, scale, ffn_memory, backward, implementation, needs):
    return tuple(u.new_empty(x.shape if need else 0) for x, need in zip((u, m_up, n_down), needs, strict=True))


def _save(ctx, inputs, output):
    u, m_up, n_down, *ctx.how, _ = inputs
    ctx.save_for_backward(u, m_up, n_down, *output[1:])


def _backward(ctx, dv, *_):
    needs = list(ctx.needs_input_grad[:3])
    grads = core_backward(*ctx.saved_tensors, dv, *ctx.how, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8


core.register_autograd(_backward, setup_context=_save)


def ffn_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, implementation: str) -> Tensor:
    """`ops.ffn_core` for a tracer: everything but the plain reference, inputs already checked."""
    keep = torch.is_grad_enabled() and (u.requires_grad or m_up.requires_grad or n_down.requires_grad)
    how = options.sparse, options.method, options.gradient, options.scale, options.ffn_memory, options.backward
    v, _, _ = core(u.reshape(u.shape[:-1].numel(), u.shape[-1]), m_up, n_down, *how, implementation, keep)
    return v.view(*u.shape[:-1], n_down.shape[0])
