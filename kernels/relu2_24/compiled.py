"""`ffn_core` as one operator, `elas::relu2_24_core`, and its backward, for torch.compile, `torch.func` and DTensor.

- torch.compile and torch.export treat it as one node of the graph.
- `torch.func` (`grad`, `vmap`, `jacrev`, …) and batched gradients: the batch dimension joins the tokens if all samples
  share the factors; otherwise, as for per-sample gradients of the factors, the samples are computed one after another.
- DTensor: sharding.py has the rules.

The implementation is chosen when the operator runs, not when it is traced, so tracing neither builds an extension nor
logs. The kept tensors have the shapes that `Passes` (passes.py) defines for the memory mode, for every implementation.
Plain eager calls do not use the operator: one written in Python costs about 20 µs more per call than an autograd
function.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, fields

import torch
from torch import Tensor

from elas.kernels.relu2_24 import registry
from elas.kernels.relu2_24.autocast import autocast_off
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Operands, Passes
from elas.kernels.relu2_24.reference import NO_SECOND, no_forward_mode

# The first argument after the tensors must be an int: the sharding cache that `register_sharding` sets up compares
# calls by their arguments from the first int on, and without one would return the result of another call.
KEEP, NOT_KEEP = 1, 0


_SCHEMA_TYPES = {bool: "bool", str: "str", float: "float"}
_HOW = ", ".join(f"{_SCHEMA_TYPES[type(field.default)]} {field.name}" for field in fields(Relu24Options))
_REST = f"{_HOW}, str implementation) -> (Tensor, Tensor, Tensor)"
"""The end of the operators' schemas: the options in the order of their fields, the implementation, three results."""


def how_of(options: Relu24Options, implementation: str) -> tuple:
    """The operators' last arguments."""
    return *astuple(options), implementation


def options_of(how: Sequence) -> Relu24Options:
    """The options, from the operators' last arguments."""
    return Relu24Options(*how[:-1])


def kept_of(keep: int, options: Relu24Options) -> int:
    """How many of the two kept tensors are used; an operator has a fixed number of outputs, so the others are empty."""
    if not keep or options.ffn_memory == "fused":
        return 0
    return 1 if not options.sparse or options.gradient == "ste" or options.ffn_memory == "eager" else 2


def _passes(u: Tensor, m_up: Tensor, n_down: Tensor, how: Sequence) -> Passes:
    """The passes of the implementation that runs here."""
    one = registry.select(options_of(how), u.device, u.dtype, how[-1], registry.Widths.of(m_up, n_down))
    assert one.passes is not None, f"{one.name} has no passes, and {one.ffn_memory} memory requires them"
    return one.passes


def _two(tensors: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    """The kept tensors, filled up to two with empty ones."""
    return [*tensors, *(like.new_empty(0) for _ in range(2 - len(tensors)))]


@torch.library.custom_op(
    "elas::relu2_24_core",
    mutates_args=(),
    schema=f"(Tensor u, Tensor m_up, Tensor n_down, SymInt keep, {_REST}",
)
def core(u, m_up, n_down, keep, *how):
    """`v [n, r_out]` from `u [n, r_in]`, and the two kept tensors."""
    options = options_of(how)
    passes = _passes(u, m_up, n_down, how)
    with autocast_off(u.device):
        v, kept = passes.forward(Operands(u, m_up, n_down), options, bool(keep))
    return (v, *_two(kept, u))


@core.register_fake
def _(u, m_up, n_down, keep, *how):
    n, f = u.shape[0], m_up.shape[0]
    options = options_of(how)
    v = u.new_empty(n, n_down.shape[0])
    number = kept_of(keep, options)
    if number < 2:
        return (v, *_two((u.new_empty(n, f),) * number, u))
    groups = f // 4
    codes = (groups + 1) // 2 if options.method == "magnitude" else groups
    return v, u.new_empty(n, f // 2), u.new_empty(n, codes, dtype=torch.uint8)


@torch.library.custom_op(
    "elas::relu2_24_core_backward",
    mutates_args=(),
    schema=f"(Tensor u, Tensor m_up, Tensor n_down, Tensor kept0, Tensor kept1, Tensor dv, SymInt needs, {_REST}",
)
def core_backward(u, m_up, n_down, kept0, kept1, dv, needs, *how):
    """`du`, `dm_up`, `dn_down`, empty where their bit in `needs` (1, 2, 4) is not set."""
    options = options_of(how)
    passes = _passes(u, m_up, n_down, how)
    kept = (kept0, kept1)[: kept_of(KEEP, options)]
    with autocast_off(u.device):
        grads = passes.backward(Operands(u, m_up, n_down), kept, dv, options, needed(needs))
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


@core_backward.register_fake
def _(u, m_up, n_down, kept0, kept1, dv, needs, *how):
    return tuple(u.new_empty(x.shape if need else 0) for x, need in zip((u, m_up, n_down), needed(needs), strict=True))


def needed(needs: int) -> tuple[bool, bool, bool]:
    """The bits of `needs`."""
    return bool(needs & 1), bool(needs & 2), bool(needs & 4)


def backward_through(tensors: tuple[Tensor, ...], dv: Tensor, needs: tuple[bool, ...], how: tuple):
    """The gradients, computed by the operator; None where they are not needed.

    Args:
        tensors: u `[n, r_in]`, m_up, n_down and the two kept tensors.
        dv: `[n, r_out]`.
        needs: whether u, m_up and n_down require a gradient.
        how: from `how_of`.
    """
    bits = sum(2**number for number, need in enumerate(needs) if need)
    grads = core_backward(*tensors, dv, bits, *how)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _save(ctx, inputs, output):
    u, m_up, n_down, _, *how = inputs
    ctx.how = tuple(how)
    ctx.save_for_backward(u, m_up, n_down, *output[1:])


def _backward(ctx, dv, *_):
    grads = backward_through(ctx.saved_tensors, dv, tuple(ctx.needs_input_grad[:3]), ctx.how)
    return *grads, *[None] * 8


def _refuse(ctx, *_):
    raise RuntimeError(NO_SECOND)


core.register_autograd(_backward, setup_context=_save)
core_backward.register_autograd(_refuse)


def _batch_as_tokens(batch: int, tensors: tuple, dims: tuple) -> list[Tensor]:
    """Tensors `[n, …]` as `[batch·n, …]`; one without a batch dimension is repeated for every sample."""
    return [
        (x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1) for x, dim in zip(tensors, dims)
    ]


def _one_by_one(batch: int, operator, tensors: tuple, dims: tuple, how: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    results = [
        operator(*(x if dim is None else x.select(dim, one) for x, dim in zip(tensors, dims)), *how)
        for one in range(batch)
    ]
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0, 0)


@core.register_vmap
def _(info, in_dims, u, m_up, n_down, *how):
    if in_dims[1] is not None or in_dims[2] is not None:
        return _one_by_one(info.batch_size, core, (u, m_up, n_down), in_dims, how)
    (rows,) = _batch_as_tokens(info.batch_size, (u,), in_dims[:1])
    v, *kept = core(rows, m_up, n_down, *how)
    number = kept_of(how[0], options_of(how[1:]))
    batched = [x.unflatten(0, (info.batch_size, -1)) if i <= number else x for i, x in enumerate((v, *kept))]
    return tuple(batched), tuple(0 if i <= number else None for i in range(3))


@core_backward.register_vmap
def _(info, in_dims, u, m_up, n_down, kept0, kept1, dv, *how):
    tensors, dims = (u, m_up, n_down, kept0, kept1, dv), in_dims[:6]
    if how[0] != 1 or dims[1] is not None or dims[2] is not None:
        return _one_by_one(info.batch_size, core_backward, tensors, dims, how)
    number = kept_of(KEEP, options_of(how[1:]))
    kept = _batch_as_tokens(info.batch_size, (kept0, kept1)[:number], dims[3:5])
    rows, drows = _batch_as_tokens(info.batch_size, (u, dv), (dims[0], dims[5]))
    du, *nothing = core_backward(rows, m_up, n_down, *_two(tuple(kept), u), drows, *how)
    return (du.unflatten(0, (info.batch_size, -1)), *nothing), (0, None, None)


class _Operator(torch.autograd.Function):
    """An operator for gradients of `torch.func`, which do not support what `register_autograd` makes."""

    generate_vmap_rule = True  # from the operator's own rule
    jvp = staticmethod(no_forward_mode)


class _UnderFunc(_Operator):
    @staticmethod
    def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
        return core(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dv, *_):
        if dv is None:  # v was not used
            return (None,) * 11
        bits = sum(2**number for number, need in enumerate(ctx.needs_input_grad[:3]) if need)
        grads = _BackwardUnderFunc.apply(*ctx.saved_tensors, dv, bits, *ctx.how)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3])), *[None] * 8


class _BackwardUnderFunc(_Operator):
    @staticmethod
    def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
        return core_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    backward = staticmethod(_refuse)


def ffn_core(
    u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, implementation: str, under_func: bool = False
) -> Tensor:
    """`ops.ffn_core` through the operator, for everything but the plain reference; inputs are already checked.

    Args:
        u: `[..., r_in]`.
        m_up: `[f, r_in]`.
        n_down: `[r_out, f]`.
        options: as in `ops.ffn_core`.
        implementation: as in `ops.ffn_core`.
        under_func: whether this runs inside a transform of `torch.func`. Then the tensors for the backward pass are
            always kept, since `requires_grad` does not show whether a gradient is wanted.
    """
    wanted = torch.is_grad_enabled() and (u.requires_grad or m_up.requires_grad or n_down.requires_grad)
    rows = u.reshape(math.prod(u.shape[:-1]), u.shape[-1])  # `numel()` would fix a traced number of tokens
    how = how_of(options, implementation)
    run = _UnderFunc.apply if under_func else core
    v, _, _ = run(rows, m_up, n_down, KEEP if wanted or under_func else NOT_KEEP, *how)
    return v.view(*u.shape[:-1], n_down.shape[0])
