"""The feature-wise backward recipe: weight gradients from an activation that is 2:4 along tokens too.

Shapes: `f` features, `n` tokens, `r_in` and `r_out` widths of u and v; ρ = relu(z).

Sparse tensor cores require 2:4 along the dimension that a product sums over. The forward product and du sum over
features, which the 2:4 pruning of each token serves (dz is 0 where s is). Both weight gradients sum over tokens and
require 2:4 along tokens. Haziza et al. (arXiv 2503.16672) compute, in every backward pass:

1. Tokens are put in a fixed random order, since adjacent tokens activate the same features, and split into groups of
   four.
2. The 95 % of features with the fewest non-zeros are pruned along tokens in addition to the mask along features: the
   two largest of a group's four values of ρ are kept, in s and in dz. The densest 5 % are not pruned further, for a
   dense product.
3. `dn_down = dvᵀ s̃`, `dm_up = d̃zᵀ u`; du is exact.

This file emulates the recipe with masks and dense products in any dtype, to study its effect on training on any
machine; it is slower than the exact backward pass. Results depend on the layout, unlike those of the other
implementations: dense features are chosen among this rank's features, and groups among a micro-batch's tokens.
Permuting tokens where groups are formed is equivalent to permuting them before the FFN and back after it.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from elas.kernels.relu2_24 import pack, reference
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands
from elas.kernels.relu2_24.plain.compressed import times_root

SPARSE_SHARE = 0.95
"""Share of the features that are pruned along tokens."""
PERMUTATION_SEED = 2503_16672


@lru_cache(maxsize=8)
def token_order(tokens: int, device: torch.device) -> Tensor:
    """A fixed random permutation: int64 `[tokens]`, the same in every process."""
    generator = torch.Generator().manual_seed(PERMUTATION_SEED)
    return torch.randperm(tokens, generator=generator).to(device)


def dense_features(root: Tensor) -> Tensor:
    """Whether each feature of `root [n, f]` is among the densest 5 %, rounded up: bool `[f]`; ties: the lower index."""
    features = root.shape[1]
    chosen = torch.argsort((root != 0).sum(0), descending=True, stable=True)[: features - int(SPARSE_SHARE * features)]
    return torch.zeros(features, dtype=torch.bool, device=root.device).index_fill_(0, chosen, True)


def token_mask(root: Tensor) -> Tensor:
    """The mask of the weight gradients: bool `[n, f]`, 2:4 along permuted tokens, all True for a dense feature.

    Args:
        root: ρ where the mask along features keeps it, else 0: `[n, f]`. A last group of fewer than four tokens is
            padded with zeros; ties go to the token that is first in the random order.
    """
    tokens = root.shape[0]
    order = token_order(tokens, root.device)
    columns = pad(root.index_select(0, order).T, (0, -tokens % 4))
    mask = torch.empty_like(root, dtype=torch.bool)
    mask[order] = pack.keep_mask(columns).T[:tokens]
    return mask | dense_features(root)


class SplitBackward:
    """`Passes` that keep ρ and prune it again in the backward pass; magnitude and the masked gradient only."""

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`, exact; keeps ρ."""
        u, m_up, n_down = operands
        rho = linear(u, m_up).relu_()
        return linear(reference.prune(rho, options), n_down), (rho,) if keep else ()

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """Exact du; dm_up and dn_down under `token_mask` (exact without `options.sparse`)."""
        u, m_up, n_down = operands
        needs_u, needs_m, needs_n = needs
        (rho,) = kept
        du = dm_up = dn_down = None
        root = torch.where(pack.keep_mask(rho), rho, 0) if options.sparse else rho
        seen = token_mask(root) if options.sparse else root.new_ones((), dtype=torch.bool)
        if needs_n:
            dn_down = dv.T @ torch.where(seen, root.square(), 0)
        if needs_u or needs_m:
            dz = times_root(dv @ n_down, root)
            dm_up = torch.where(seen, dz, 0).T @ u if needs_m else None
            du = dz @ m_up if needs_u else None
        return du, dm_up, dn_down
