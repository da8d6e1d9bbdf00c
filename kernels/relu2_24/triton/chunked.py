"""`Passes` of fused memory in chunks of tokens: PyTorch's products, and one Triton pass over a chunk between them.

Shapes: `f` features, `n` tokens, `c` tokens of a chunk, `r_in` and `r_out` widths of u and v.

    forward    z = u m_upᵀ [c, f]   s in its place   v = s n_downᵀ
    backward   z and ds = dv n_down [c, f]   s and dz in their place   dn_down += dvᵀ s   dm_up += dzᵀ u   du = dz m_up

Nothing f wide is kept, and z is computed twice, so there are seven products; the kernels of fused.py compute nine, of
which the wide accumulators of large ranks leave little of the tensor cores' speed. Weight gradients are summed over
chunks in fp32.
"""

import torch
from torch import Tensor

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands
from elas.kernels.relu2_24.registry import Implementation, register
from elas.kernels.relu2_24.triton.compressed import TILE, grid, prune_in_place
from elas.kernels.relu2_24.triton.fused import kernels_of, method_of, on, passes_obstacle, scale_of

PRIORITY = 15
"""Above PyTorch's own operations, below `triton`, which says itself which widths it leaves to this one."""
CHUNK_TOKENS = 4096
"""c. With a quarter of it, z and ds of a chunk fit in an H100's L2 cache, but Python submits the many small launches
more slowly than the GPU works them off (docs/kernels.md)."""


def step(z: Tensor, ds: Tensor, options: Relu24Options) -> tuple[Tensor, Tensor]:
    """s and dz `[c, f]` in the memory of z and ds, which are contiguous."""
    if z.numel():
        with on(z):
            kernels_of("compressed").step_kernel[grid(*z.shape)](
                z, ds, *z.shape, scale_of(options), method_of(options), options.gradient == "ste", *TILE
            )
    return z, ds


class _Sum:
    """A sum of products in fp32; `result` has the dtype of the operands."""

    def __init__(self, rows: int, columns: int, like: Tensor):
        self.like = like
        self.total = like.new_zeros(rows, columns, dtype=torch.float32)

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.like.dtype == torch.float32:
            self.total.addmm_(a, b)
        elif a.is_cuda:
            torch.ops.aten.addmm.dtype_out(self.total, a, b, torch.float32, out=self.total)
        else:
            self.total += a @ b

    def result(self) -> Tensor:
        return self.total.to(self.like.dtype)


class TritonChunked:
    """`Passes` of fused memory, in chunks of tokens."""

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`; keeps nothing."""
        u, m_up, n_down = operands
        n, f, c = u.shape[0], m_up.shape[0], CHUNK_TOKENS
        v, z = u.new_empty(n, n_down.shape[0]), u.new_empty(min(c, n), f)
        for start in range(0, n, c):
            rows = u[start : start + c]
            s = prune_in_place(torch.mm(rows, m_up.T, out=z[: rows.shape[0]]), options)
            torch.mm(s, n_down.T, out=v[start : start + c])
        return v, ()

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du, dm_up, dn_down; computes z of every chunk again."""
        u, m_up, n_down = operands
        needs_u, needs_m, needs_n = needs
        n, f, c = u.shape[0], m_up.shape[0], CHUNK_TOKENS
        du = u.new_empty(u.shape) if needs_u else None
        dm_up = _Sum(f, u.shape[1], u) if needs_m else None
        dn_down = _Sum(n_down.shape[0], f, u) if needs_n else None
        z, ds = u.new_empty(min(c, n), f), u.new_empty(min(c, n), f)
        for start in range(0, n, c):
            rows, drows = u[start : start + c], dv[start : start + c]
            z_part, ds_part = z[: rows.shape[0]], ds[: rows.shape[0]]
            torch.mm(rows, m_up.T, out=z_part)
            if needs_u or needs_m:
                torch.mm(drows, n_down, out=ds_part)
                s, dz = step(z_part, ds_part, options)
            else:
                s, dz = prune_in_place(z_part, options), ds_part
            if dn_down is not None:
                dn_down.add(drows.T, s)
            if dm_up is not None:
                dm_up.add(dz.T, rows)
            if du is not None:
                torch.mm(dz, m_up, out=du[start : start + c])
        return du, None if dm_up is None else dm_up.result(), None if dn_down is None else dn_down.result()


register(Implementation.of_passes("chunked", "fused", TritonChunked(), passes_obstacle, priority=PRIORITY))
