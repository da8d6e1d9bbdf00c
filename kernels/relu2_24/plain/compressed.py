"""The operation with the least memory that its exact gradient requires: two kept values of four, and positions.

Shapes: `f` features, `g = f / 4` groups, `n` tokens, `r_in` and `r_out` widths of u and v; ρ = relu(z).

Kept for the backward pass, in units of one bf16 activation:

| pruning and gradient    | kept                                                      | bytes  |
|-------------------------|-----------------------------------------------------------|--------|
| magnitude, masked       | the kept values of s, a nibble a group                    | 0.5625 |
| soft threshold, masked  | the kept values of s, a byte a group (it names the third) | 0.625  |
| ste, either             | ρ, from which s is computed again                         | 1.0    |
| none (dense)            | ρ, from which s is computed again                         | 1.0    |

The gradient uses `ρ·mask = sqrt(s)`. The rounded root of a rounded square is the number itself as long as the square
neither overflows nor underflows (bf16 and fp32: 1e-19 < z < 1.8e19), so the gradient equals the reference's to the last
bit, provided that the root is rounded to the dtype of z *before* it is multiplied. Below that range s and the gradient
are 0 or close to it. For the soft threshold this holds with scale 1; otherwise the root of `s / scale` is off by one or
two roundings.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from elas.kernels.relu2_24 import pack, reference
from elas.kernels.relu2_24.autocast import autocast_off
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands, transformed


def _keeps_rho(options: Relu24Options) -> bool:
    return not options.sparse or options.gradient == "ste"


def compress(z: Tensor, options: Relu24Options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """s of `z [..., f]`, and the tensors to keep: `(ρ,)` or `(values, codes)`.

    `values [..., f/2]` in the dtype of z, `codes` uint8 `[..., ceil(g/2)]` (magnitude) or `[..., g]` (soft threshold).
    """
    rho = z.relu()
    if _keeps_rho(options):
        return reference.prune(rho, options), (rho,)
    if options.method == "magnitude":
        keep = pack.keep_mask(rho)
        s = reference.prune_magnitude(rho, keep)
        positions = pack.kept_positions(keep)
        return s, (pack.take(s, *positions), pack.encode(*positions))
    keep, third = pack.keep_and_third(rho)
    s = reference.prune_soft_threshold(rho, keep, third, options.scale)
    positions = pack.kept_positions(keep)
    # Not `> 0`: a NaN at the third passes its gradient on, as in relu's derivative.
    positive = torch.stack(pack.lanes(third & (rho != 0))).any(0)
    return s, (pack.take(s, *positions), pack.encode_third(*positions, pack.one_position(third), positive))


def restore(kept: tuple[Tensor, ...], options: Relu24Options) -> Tensor:
    """s `[..., f]`, bit-identical, from the tensors that `compress` returned to keep."""
    if _keeps_rho(options):
        return reference.prune(kept[0], options)
    values, codes = kept
    if options.method == "magnitude":
        return pack.put(values, *pack.decode(codes, values.shape[-1] // 2))
    return pack.put(values, *pack.decode_third(codes)[:2])


def gradient(kept: tuple[Tensor, ...], s: Tensor | None, ds: Tensor, options: Relu24Options) -> Tensor:
    """dz `[..., f]` from the kept tensors of `compress`, s from `restore` (or None), and `ds [..., f]`."""
    if options.sparse and options.method == "soft_threshold":
        ds = options.scale * ds
    if _keeps_rho(options):
        return times_root(ds, kept[0])
    if s is None:
        s = restore(kept, options)
    if options.method == "magnitude":
        return times_root(ds, s.sqrt())
    wide = torch.promote_types(s.dtype, torch.float32)
    d = times_root(ds, (s.to(wide) / options.scale).sqrt().to(s.dtype))
    _, _, third, positive = pack.decode_third(kept[1])
    shift = torch.where(positive, -pack.split_last(d, 4).sum(-1), 0)
    return d + pack.join([torch.where(third == j, shift, 0) for j in range(4)])


def times_root(ds: Tensor, root: Tensor) -> Tensor:
    """`2·root·ds`; 0 where the root is 0, even if ds is infinite, as in relu's derivative."""
    return torch.where(root == 0, 0, ds * (2 * root))


class CompressedRelu24(torch.autograd.Function):
    """`relu2_24` alone; keeps the tensors of `compress`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, anchor: Tensor, options: Relu24Options) -> tuple[Tensor, ...]:
        """`z [..., f]` → `s [..., f]`, and the kept tensors."""
        s, kept = compress(z, options)
        return s, *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Save the kept tensors; z and s are not saved."""
        _, anchor, ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else autograd allocates zeros as gradients of the kept tensors
        ctx.save_for_backward(anchor, *output[1:])

    @staticmethod
    def backward(ctx, ds: Tensor | None, *_) -> tuple[Tensor | None, None, None]:
        """`ds [..., f]` → `dz [..., f]`."""
        if ds is None:  # s was not used
            return None, None, None
        anchor, *kept = ctx.saved_tensors
        with autocast_off(ds.device):
            dz = gradient(tuple(kept), None, ds, ctx.options)
        return reference.no_second(dz, anchor), None, None


class _CompressedUntraced(CompressedRelu24):
    jvp = staticmethod(reference.no_forward_mode)  # a separate class, since Dynamo does not trace functions with a jvp


class TorchCompressed:
    """`Passes` of compressed memory; keeps the tensors of `compress`."""

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`, and the tensors that `compress` keeps."""
        u, m_up, n_down = operands
        if not keep:
            return reference.ffn_core(u, m_up, n_down, options), ()  # the same values without packing
        s, kept = compress(linear(u, m_up), options)
        return linear(s, n_down), kept

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du, dm_up, dn_down from the kept tensors."""
        u, m_up, n_down = operands
        needs_u, needs_m, needs_n = needs
        du = dm_up = dn_down = s = None
        if needs_n:
            s = restore(kept, options)
            dn_down = dv.T @ s
        if needs_u or needs_m:
            dz = gradient(kept, s, dv @ n_down, options)
            dm_up = dz.T @ u if needs_m else None
            du = dz @ m_up if needs_u else None
        return du, dm_up, dn_down


def relu2_24(z: Tensor, options: Relu24Options) -> Tensor:
    """The values of `reference.relu2_24`, with the compressed form kept; differentiable once."""
    if not (transformed() or (torch.is_grad_enabled() and z.requires_grad)):
        return reference.relu2_24(z, options)  # nothing to keep: the same values without packing
    run = CompressedRelu24 if torch.compiler.is_compiling() else _CompressedUntraced
    return run.apply(z, reference.anchor_of(z), options)[0]
