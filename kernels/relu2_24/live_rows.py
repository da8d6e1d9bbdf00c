"""`prune(relu(z)²) · down` for a few tokens, reading only the rows of `down` whose feature is not zero.

Generating text reads all weights for every token, so its time is that of reading. 2:4 leaves at most half of the
features of a token, squared ReLU fewer: most rows of the next matrix need not be read, if a feature's weights are
beside each other in memory. With more tokens fewer rows are zero for all of them.

Shapes: `n` tokens, `f` features, `r` outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.reference import relu2_24

MOST_TOKENS = 2
"""Tokens up to which reading live rows alone is faster."""


def live_rows(z: Tensor, down_t: Tensor, options: Relu24Options) -> Tensor:
    """The product, in C++ on a CPU for up to `MOST_TOKENS` tokens, else by a dense matrix product; no gradient.

    Args:
        z: `[n, f]`, before the squared ReLU; fp32 or bf16.
        down_t: `[f, r]`, contiguous, of z's dtype; the transposed weight.
        options: pruning; `sparse=False` leaves the zeros of the squared ReLU alone.

    Returns:
        `[n, r]` in z's dtype; sums are fp32.
    """
    if z.shape[0] <= MOST_TOKENS and serves(z.device, z.dtype) is None:
        from elas.kernels.relu2_24.cpu import mode_of, operators

        return operators().live_rows(z, down_t, mode_of(options), options.scale)
    return linear(relu2_24(z, options), down_t.t())


def serves(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ product does not run there; None if it does. Builds it at the first call."""
    from elas.kernels.relu2_24.cpu import available

    return available(device, dtype)
