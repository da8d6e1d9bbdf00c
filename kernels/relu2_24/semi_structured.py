"""The down product of compressed memory by a library's 2:4 product: cuSPARSELt, or CUTLASS as built into PyTorch.

Shapes: `f` features, `g = f / 4` groups, `n` tokens, `r_in` and `r_out` input and output width of the core.

In both the sparse operand comes first, so tokens are the rows of s and `v = s · n_downᵀ`.

- CUTLASS takes the kept values `[n, f/2]` in the layout of pack.py, and metadata in 16-bit words of four groups. A word
  is two bytes of pack.py's codes, low byte first. Only the order of the words differs, for the loads of `mma.sp`;
  `word_places` computes it (cutlass/util/host_reorder.h, `reorder_meta`). Compute capability 8.x only.
- cuSPARSELt's compressed format is opaque and may differ by chip: it receives the whole pruned s and compresses it
  itself. Compute capability 8.0 and later.

Only bf16: for fp32 both libraries implement 1:2. Not timed. At r = 256 the product is bound by reading the activation,
so fewer FLOPs help little: both rank below `triton`, which runs wherever they do, so `auto` never chooses them.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24 import pack
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Kept, Operands
from elas.kernels.relu2_24.registry import Implementation, Widths, register
from elas.kernels.relu2_24.triton import fused
from elas.kernels.relu2_24.triton.compressed import NOTHING, PACKED, RHO, TritonCompressed, prune_and_pack

_torch: Any = torch  # its 2:4 products have private names, which its stubs leave out

Library = Literal["cusparselt", "cutlass"]

MULTIPLES: dict[Library, tuple[int, int, int]] = {"cusparselt": (16, 16, 8), "cutlass": (32, 64, 8)}
"""Tokens, features and r_out must be multiples of these."""


def misfit(library: Library, widths: Widths) -> str | None:
    """Why the library cannot multiply matrices of these widths, or None."""
    _, columns, outputs = MULTIPLES[library]
    if widths.features % columns:
        return f"it requires multiples of {columns} on a rank, not features={widths.features}"
    if widths.r_out % outputs:
        return f"it requires multiples of {outputs}, not r_out={widths.r_out}"
    return None


def check_tokens(library: Library, tokens: int) -> None:
    """Refuse a number of rows that the library does not support.

    Raises:
        ConfigError: it is not a multiple of the library's.
    """
    rows = MULTIPLES[library][0]
    if tokens == 0 or tokens % rows:
        why = f"{library} takes tokens in multiples of {rows}"
        raise ConfigError("tokens", tokens, why, "choose a batch and a sequence length so, or implementation=auto")


def word_places(n: int, words: int, device: torch.device) -> Tensor:
    """Index in CUTLASS's order of each 16-bit word of `[n, words]`, row by row: int64 `[n · words]`.

    Rows are ordered in blocks of 32 in which every eighth row is adjacent; the 2 × 2 words of two such rows are
    transposed; pairs of columns are stored column-major.
    """
    row = torch.arange(n, device=device)[:, None]
    column = torch.arange(words, device=device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = column % 2 - row % 2  # 1 top right, -1 bottom left
    row, column = row + swap, column - swap
    return (column // 2 * (2 * n) + row * 2 + column % 2).flatten()


def to_cutlass(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """CUTLASS's operand from the packed form.

    Args:
        values: kept values `[n, f/2]`, n % 32 == 0, f % 64 == 0.
        codes: uint8 `[n, f/8]`, two groups a byte, or `[n, f/4]`, a byte a group (soft threshold).

    Returns:
        values, and its metadata int16 `[n, f/16]`: what `torch._sparse_semi_structured_mm` takes.
    """
    n, f = values.shape[0], 2 * values.shape[1]
    check_tokens("cutlass", n)
    if codes.shape[1] == f // 4:
        codes = pack.encode(codes & 3, (codes >> 2) & 3)
    words = codes.contiguous().view(torch.int16)
    meta = torch.empty_like(words).flatten()
    meta[word_places(n, words.shape[1], words.device)] = words.flatten()
    return values.contiguous(), meta.view(words.shape)


def down_product(library: Library, s: Tensor, packed: Kept, n_down: Tensor) -> Tensor:
    """`s [n, f] · n_downᵀ` `[n, r_out]` by a library; `packed` is `(values, codes)` of s for CUTLASS."""
    check_tokens(library, s.shape[0])
    if library == "cusparselt":
        return _torch._cslt_sparse_mm(_torch._cslt_compress(s.contiguous()), n_down.T)
    values, codes = packed
    return _torch._sparse_semi_structured_mm(*to_cutlass(values, codes), n_down.T)


def obstacle(library: Library, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library cannot multiply on `device` in `dtype`, or None."""
    reason = fused.passes_obstacle(device, torch.bfloat16)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"{library} takes 2:4 matrices in bfloat16, not {dtype}"
    if library == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this PyTorch is built without cuSPARSELt"
    if library == "cutlass" and torch.cuda.get_device_capability(device)[0] != 8:
        return "PyTorch's CUTLASS 2:4 products are for compute capability 8.x; use cusparselt"
    return None


def unsupported(options: Relu24Options) -> str | None:
    """Why a library does not serve these options, or None."""
    return None if options.sparse else "it multiplies 2:4 activations only"


class LibraryCompressed(TritonCompressed):
    """`Passes` of compressed memory with a library's down product; the backward pass is that of TritonCompressed."""

    def __init__(self, library: Library):
        self.library: Library = library

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`, and the tensors that `plain.compressed.compress` keeps."""
        u, m_up, n_down = operands
        z = torch.nn.functional.linear(u, m_up)
        masked = options.gradient == "masked"
        needs_packed = self.library == "cutlass" or (keep and masked)
        s, packed = prune_and_pack(z, options, PACKED if needs_packed else NOTHING)
        v = down_product(self.library, s, packed, n_down)
        if not keep:
            return v, ()
        return v, packed if masked else prune_and_pack(z, options, RHO)[1]


def _register(library: Library, priority: int) -> None:
    register(
        Implementation.of_passes(
            library,
            "compressed",
            LibraryCompressed(library),
            partial(obstacle, library),
            priority=priority,
            supports=unsupported,
            fits=lambda widths, device, dtype: misfit(library, widths),
        )
    )


_register("cusparselt", 6)
_register("cutlass", 5)
