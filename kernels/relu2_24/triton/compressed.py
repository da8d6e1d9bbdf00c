"""`Passes` of compressed memory with Triton kernels; Triton is imported at first use.

The kept tensors are those of plain/compressed.py.

Shapes: `f` features, `g = f / 4` groups, `n` tokens, `r_in` and `r_out` widths of u and v; ρ = relu(z).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands
from elas.kernels.relu2_24.registry import Implementation, register
from elas.kernels.relu2_24.triton.fused import PRIORITY, kernels_of, method_of, on, passes_obstacle, scale_of

TILE = (4, 512)
"""Tokens and features of a program's tile: 16 values for each of its 128 threads, 256 bits of bf16."""
NOTHING, RHO, PACKED = 0, 1, 2


def grid(n: int, f: int) -> tuple[int, int]:
    """Programs of a pass over `[n, f]`."""
    return -(-n // TILE[0]), -(-f // TILE[1])


def _empty_codes(n: int, f: int, options: Relu24Options, like: Tensor) -> Tensor:
    """uint8 `[n, ceil(g/2)]`; for the soft threshold `[n, g]`."""
    columns = f // 4 if options.method == "soft_threshold" else -(-f // 8)
    return like.new_empty(n, columns, dtype=torch.uint8)


def prune_and_pack(z: Tensor, options: Relu24Options, keep: int) -> tuple[Tensor, Kept]:
    """s of `z [n, f]`, and `()`, `(ρ,)` or `(values, codes)` for `keep` NOTHING, RHO or PACKED."""
    z = z.contiguous()
    (n, f), s = z.shape, z.new_empty(z.shape)
    kept: Kept = ()
    if keep == RHO:
        kept = (z.new_empty(n, f),)
    elif keep == PACKED:
        kept = z.new_empty(n, f // 2), _empty_codes(n, f, options, z)
    values, codes = kept[0] if kept else s, kept[-1] if kept else s  # unused pointers must be valid
    if z.numel():
        with on(z):
            kernels_of("compressed").prune_and_pack_kernel[grid(n, f)](
                z, s, values, codes, n, f, codes.shape[1], scale_of(options), method_of(options), keep, *TILE
            )
    return s, kept


def prune_in_place(z: Tensor, options: Relu24Options) -> Tensor:
    """s in the memory of `z [n, f]`, which is contiguous."""
    if z.numel():
        (n, f), codes = z.shape, options.method == "soft_threshold"
        with on(z):
            kernels_of("compressed").prune_and_pack_kernel[grid(n, f)](
                z, z, z, z, n, f, f // 4 if codes else -(-f // 8), scale_of(options), method_of(options), NOTHING, *TILE
            )
    return z


def restore(
    kept: Kept, ds: Tensor | None, options: Relu24Options, needs_s: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """s if `needs_s`, and dz if `ds [n, f]` is given, from `(values [n, f/2], codes)`."""
    values, codes = kept
    n, f = values.shape[0], 2 * values.shape[1]
    s = values.new_empty(n, f) if needs_s else None
    dz = None if ds is None else values.new_empty(n, f)
    ds = values if ds is None else ds.contiguous()
    if values.numel():
        with on(values):
            kernels_of("compressed").restore_kernel[grid(n, f)](
                values,
                codes,
                ds,
                values if s is None else s,
                values if dz is None else dz,
                n,
                f,
                codes.shape[1],
                scale_of(options),
                method_of(options),
                s is not None,
                dz is not None,
                *TILE,
            )
    return s, dz


def slope(rho: Tensor, ds: Tensor, options: Relu24Options) -> Tensor:
    """dz `[n, f]` of relu² without pruning: for the dense activation, and for ste."""
    ds, dz = ds.contiguous(), torch.empty_like(rho)
    if rho.numel():
        with on(rho):
            kernels_of("compressed").slope_kernel[grid(*rho.shape)](rho, ds, dz, *rho.shape, scale_of(options), *TILE)
    return dz


class TritonCompressed:
    """`Passes` of compressed memory: products by PyTorch, and one Triton pass over `[n, f]` between them."""

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`, and the tensors that `plain.compressed.compress` keeps."""
        u, m_up, n_down = operands
        masked = options.sparse and options.gradient == "masked"
        s, kept = prune_and_pack(linear(u, m_up), options, NOTHING if not keep else PACKED if masked else RHO)
        return linear(s, n_down), kept

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du, dm_up, dn_down from the kept tensors."""
        u, m_up, n_down = operands
        needs_u, needs_m, needs_n = needs
        ds = dv @ n_down if needs_u or needs_m else None
        if len(kept) == 1:
            s = prune_and_pack(kept[0], options, NOTHING)[0] if needs_n else None
            dz = None if ds is None else slope(kept[0], ds, options)
        else:
            s, dz = restore(kept, ds, options, needs_n)
        du = None if dz is None or not needs_u else dz @ m_up
        dm_up = None if dz is None or not needs_m else dz.T @ u
        return du, dm_up, None if s is None else dv.T @ s


register(Implementation.of_passes("triton", "compressed", TritonCompressed(), passes_obstacle, priority=PRIORITY))
