"""Products of a few tokens, whose time is that of reading the weights.

Generating text reads all weights for every token. 2:4 leaves at most half of the features of a token, squared ReLU
fewer: most rows of the next matrix need not be read, if a feature's weights are beside each other in memory
(`live_rows`; with more tokens fewer rows are zero for all of them). And the second factor of a low-rank pair has rows
as short as the rank, which BLAS reads at about half the speed that memory has (`low_rank`).

Shapes: `n` tokens, `f` features, `r` outputs of the down factor, or the rank; `h`, `o` inputs and outputs of a pair.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.reference import relu2_24

MOST_LIVE = 2
"""Tokens up to which `live_rows` is faster than a dense product."""
MOST_LOW_RANK = {torch.float32: 4, torch.bfloat16: 1}
"""The same of `low_rank`: numbers of bf16 are widened for each token."""


def live_rows(z: Tensor, down_t: Tensor, options: Relu24Options, factor_out: Tensor | None = None) -> Tensor:
    """`prune(relu(z)²) · down (· factor_outᵀ)`; no gradient. In C++ on a CPU for up to `MOST_LIVE` tokens, else dense.

    Args:
        z: `[n, f]`, before the squared ReLU; fp32 or bf16.
        down_t: `[f, r]`, contiguous, of z's dtype; the transposed weight.
        options: pruning; `sparse=False` leaves the zeros of the squared ReLU alone.
        factor_out: `[o, r]`, contiguous, of z's dtype: the second factor, if `down` is the first.

    Returns:
        `[n, r]`, or `[n, o]` with `factor_out`, in z's dtype; sums are fp32.
    """
    if z.shape[0] <= MOST_LIVE and serves(z.device, z.dtype) is None:
        from elas.kernels.relu2_24.cpu import mode_of, operators

        return operators().live_rows(z, down_t, mode_of(options), options.scale, factor_out)
    s = relu2_24(z, options)
    u = (s.float() @ down_t.float()).to(s.dtype) if emulated(s.device, s.dtype) else linear(s, down_t.t())
    return u if factor_out is None else linear(u, factor_out)


def low_rank(x: Tensor, factor_in: Tensor, factor_out: Tensor) -> Tensor:
    """`x · factor_inᵀ · factor_outᵀ`, in C++ on a CPU for up to `MOST_LOW_RANK` tokens, else two products; no gradient.

    Args:
        x: `[n, h]`, fp32 or bf16.
        factor_in: `[r, h]`, contiguous, of x's dtype.
        factor_out: `[o, r]`, likewise.

    Returns:
        `[n, o]` in x's dtype; sums are fp32, and the bottleneck is rounded to x's dtype.
    """
    if x.shape[0] <= MOST_LOW_RANK.get(x.dtype, 0) and serves(x.device, x.dtype) is None:
        from elas.kernels.relu2_24.cpu import operators

        return operators().low_rank(x, factor_in, factor_out)
    return linear(linear(x, factor_in), factor_out)


def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether dense products are emulated there, as bf16 on a CPU without its instructions: many times slower."""
    supported: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return device.type == "cpu" and dtype == torch.bfloat16 and not supported()


def serves(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ products do not run there; None if they do. Builds them at the first call."""
    from elas.kernels.relu2_24.cpu import available

    return available(device, dtype)
