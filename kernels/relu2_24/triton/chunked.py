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
from elas.kernels.relu2_24.plain import fused
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


class _Sum(fused.Sum):
    """A sum of products in fp32, each added to it by cuBLAS."""

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a · b."""
        if self.total.dtype != a.dtype and a.is_cuda:
            torch.ops.aten.addmm.dtype_out(self.total, a, b, torch.float32, out=self.total)
        else:
            super().add(a, b)


class TritonChunked(fused.TorchFused):
    """`Passes` of fused memory, in chunks of tokens."""

    sums = _Sum

    def chunk_tokens(self, features: int, device: torch.device) -> int:
        """`CHUNK_TOKENS`."""
        return CHUNK_TOKENS

    def prune(self, z: Tensor, options: Relu24Options) -> Tensor:
        """s in the memory of z."""
        return prune_in_place(z, options)

    def step(self, z: Tensor, ds: Tensor, options: Relu24Options) -> tuple[Tensor, Tensor]:
        """s and dz in the memory of z and ds."""
        return step(z, ds, options)


register(Implementation.of_passes("chunked", "fused", TritonChunked(), passes_obstacle, priority=PRIORITY))
