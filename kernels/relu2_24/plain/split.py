"""The feature-wise backward recipe: weight gradients from an activation that is 2:4 along tokens too.

Shapes: `f` features, `n` tokens, `r_in`, `r_out` widths of the two ends of the core; ρ = relu(z).

Sparse tensor cores prune along the dimension a product sums over. The forward product and du sum over features, so the
token-wise 2:4 of s (and of dz, which is 0 where s is) serves them. Both weight gradients sum over tokens and need 2:4
along those. The recipe of Haziza et al. (arXiv 2503.16672), for each call of the backward pass:

1. Tokens are taken in a fixed random order, since neighbouring ones fire the same features, and cut into groups of
   four.
2. The 95 % of features with the fewest non-zeros are pruned along tokens on top of the token-wise mask: of a group's
   four values of ρ the two largest stay, and that mask serves s and dz. The densest 5 % stay as they are, for a dense
   product.
3. `dn_down = dvᵀ s̃`, `dm_up = d̃zᵀ u`; du is exact.

This emulates it with masks and dense products, in any dtype, so that its effect on training can be studied anywhere; it
is slower than the exact backward. Which features count as dense, and who shares a group, is decided among this rank's
features and a micro-batch's tokens: unlike everything else here, results depend on the layout. Permuting before the
groups are formed is the same as permuting before the FFN and undoing it after.
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
"""Share of the features that is pruned along tokens."""
PERMUTATION_SEED = 2503_16672


@lru_cache(maxsize=8)
def token_order(tokens: int, device: torch.device) -> Tensor:
    """The fixed random order of `tokens` tokens: int64 `[tokens]`, the same in every process."""
    generator = torch.Generator().manual_seed(PERMUTATION_SEED)
    return torch.randperm(tokens, generator=generator).to(device)


def dense_features(root: Tensor) -> Tensor:
    """Which features of `root [n, f]` are among the densest 5 %, rounded up: bool `[f]`; of equals the lower index."""
    features = root.shape[1]
    chosen = torch.argsort((root != 0).sum(0), descending=True, stable=True)[: features - int(SPARSE_SHARE * features)]
    return torch.zeros(features, dtype=torch.bool, device=root.device).index_fill_(0, chosen, True)


def token_mask(root: Tensor) -> Tensor:
    """What the weight gradients see: bool `[n, f]`, 2:4 along the permuted tokens, or everything of a dense feature.

    Args:
        root: ρ where the token-wise mask keeps it, else 0: `[n, f]`. A last group of fewer than four tokens is filled
            up with zeros; ties go to the token that comes first in the random order.
    """
    tokens = root.shape[0]
    order = token_order(tokens, root.device)
    columns = pad(root.index_select(0, order).T, (0, -tokens % 4))
    mask = torch.empty_like(root, dtype=torch.bool)
    mask[order] = pack.keep_mask(columns).T[:tokens]
    return mask | dense_features(root)


class SplitBackward:
    """`Passes` that keep ρ and prune it again for each use; magnitude and the masked gradient only."""

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`, exact; keeps ρ."""
        u, m_up, n_down = operands
        rho = linear(u, m_up).relu_()
        return linear(reference.prune(rho, options), n_down), (rho,) if keep else ()

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du exactly; dm_up and dn_down from what `token_mask` leaves (while not `options.sparse`, exactly too)."""
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
