"""`ffn_core` in chunks of tokens, so that no tensor `[n, f]` is allocated: plain PyTorch, on every device.

Shapes: `f` features, `n` tokens, `c` tokens of a chunk, `r_in` and `r_out` widths of u and v; ρ = relu(z).

    forward    z = u m_upᵀ [c, f]   s = prune(ρ²)   v = s n_downᵀ
    backward   z and s again        dn_down += dvᵀ s   ds = dv n_down   dz   dm_up += dzᵀ u   du = dz m_up

One product of seven is computed twice, and only u is kept. It is fast where large new tensors are expensive: on a CPU
each of their pages faults on first touch. Weight gradients are summed over chunks in fp32 or wider.
"""

import torch
from torch import Tensor

from elas.kernels.relu2_24 import pack, reference
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands
from elas.kernels.relu2_24.plain.compressed import times_root

CHUNK_VALUES = {"cpu": 2**19, "cuda": 2**25}
"""Values of z in a chunk: on a CPU a few chunks fit in the caches, on a GPU one chunk occupies the whole device."""


def chunk_tokens(features: int, device: torch.device) -> int:
    """c: tokens in a chunk."""
    return max(64, CHUNK_VALUES.get(device.type, 2**25) // max(features, 1))


def step(z: Tensor, ds: Tensor, options: Relu24Options) -> tuple[Tensor, Tensor]:
    """s and dz from `z, ds [..., f]`: the activation and its gradient, without autograd."""
    rho = z.relu()
    if not options.sparse:
        return rho.square(), times_root(ds, rho)
    if options.method == "magnitude":
        keep = pack.keep_mask(rho)
        root = rho if options.gradient == "ste" else torch.where(keep, rho, 0)
        return reference.prune_magnitude(rho, keep), times_root(ds, root)
    keep, third = pack.keep_and_third(rho)
    s = reference.prune_soft_threshold(rho, keep, third, options.scale)
    if options.gradient == "ste":
        return s, times_root(options.scale * ds, rho)
    t = pack.split_last(torch.where(third, rho, 0), 4).sum(-1, keepdim=True)
    excess = torch.where(keep, (pack.split_last(rho, 4) - t).flatten(-2), 0)
    d = times_root(options.scale * ds, excess)
    total = pack.split_last(d, 4).sum(-1, keepdim=True).expand(*d.shape[:-1], d.shape[-1] // 4, 4).flatten(-2)
    return s, torch.where(third & (rho != 0), -total, d)


class Sum:
    """A sum of products in fp32 (fp64 for fp64 operands); `result` has the dtype of the operands."""

    def __init__(self, rows: int, columns: int, like: Tensor):
        self.dtype = like.dtype
        self.total = like.new_zeros(rows, columns, dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the product of `a [rows, c]` and `b [c, columns]`."""
        if self.total.dtype == a.dtype:
            self.total.addmm_(a, b)
        else:
            self.total += a @ b

    def result(self) -> Tensor:
        """`[rows, columns]` in the dtype of the operands."""
        return self.total.to(self.dtype)


class TorchFused:
    """`Passes` of fused memory, in chunks of tokens; triton/chunked.py replaces what lies between the products."""

    sums: type = Sum

    def chunk_tokens(self, features: int, device: torch.device) -> int:
        """c: tokens in a chunk."""
        return chunk_tokens(features, device)

    def prune(self, z: Tensor, options: Relu24Options) -> Tensor:
        """s of `z [c, f]`, which may be overwritten."""
        return reference.prune(z.relu_(), options)

    def step(self, z: Tensor, ds: Tensor, options: Relu24Options) -> tuple[Tensor, Tensor]:
        """s and dz of `z` and `ds` `[c, f]`, which may be overwritten."""
        return step(z, ds, options)

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`; keeps nothing."""
        u, m_up, n_down = operands
        n, f = u.shape[0], m_up.shape[0]
        c = self.chunk_tokens(f, u.device)
        v, z = u.new_empty(n, n_down.shape[0]), u.new_empty(min(c, n), f)
        for start in range(0, n, c):
            rows = u[start : start + c]
            part = z[: rows.shape[0]]
            torch.mm(rows, m_up.T, out=part)
            torch.mm(self.prune(part, options), n_down.T, out=v[start : start + c])
        return v, ()

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du, dm_up, dn_down; computes z of every chunk again."""
        u, m_up, n_down = operands
        needs_u, needs_m, needs_n = needs
        n, f = u.shape[0], m_up.shape[0]
        c = self.chunk_tokens(f, u.device)
        du = u.new_empty(u.shape) if needs_u else None
        dm_up = self.sums(f, u.shape[1], u) if needs_m else None
        dn_down = self.sums(n_down.shape[0], f, u) if needs_n else None
        z, ds = u.new_empty(min(c, n), f), u.new_empty(min(c, n), f)
        for start in range(0, n, c):
            rows, drows = u[start : start + c], dv[start : start + c]
            z_part, ds_part = z[: rows.shape[0]], ds[: rows.shape[0]]
            torch.mm(rows, m_up.T, out=z_part)
            if needs_u or needs_m:
                torch.mm(drows, n_down, out=ds_part)
                s, dz = self.step(z_part, ds_part, options)
            else:
                s, dz = self.prune(z_part, options), ds_part
            if dn_down is not None:
                dn_down.add(drows.T, s)
            if dm_up is not None:
                dm_up.add(dz.T, rows)
            if du is not None:
                torch.mm(dz, m_up, out=du[start : start + c])
        return du, None if dm_up is None else dm_up.result(), None if dn_down is None else dn_down.result()
