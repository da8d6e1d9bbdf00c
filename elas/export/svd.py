"""Low-rank factors of a weight by truncated singular value decomposition.

Singular vectors come from the eigenvectors of the Gram matrix of the smaller side, in fp64: on a CPU ten times faster
than a decomposition of the matrix itself. That resolves singular values down to 1e-8 of the largest, below what an fp32
weight holds; and since the product is the weight projected on orthonormal vectors, it is as exact as they are.

Legend: o output width, i input width, r rank.
"""

import torch


def truncated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of a weight by a product of two factors, W ≈ factor_out · factor_in.

    The factors are balanced, U√S and √S·Vᵀ: their columns and rows are equally long, as an initialisation makes them,
    so that one learning rate suits both.

    Args:
        weight: `[o, i]`.
        rank: r, at most the smaller of o and i.

    Returns:
        factor_in `[r, i]` and factor_out `[o, r]`, fp32, and the share of the weight's energy, the squared Frobenius
        norm, that their product keeps (1 for a weight of zeros).
    """
    if weight.shape[0] > weight.shape[1]:
        factor_out, factor_in, kept = truncated(weight.T, rank)
        return factor_in.T.contiguous(), factor_out.T.contiguous(), kept
    whole = weight.double()
    _, vectors = torch.linalg.eigh(whole @ whole.T)  # ascending
    left = vectors[:, -rank:].flip(1)
    right = left.T @ whole
    singular = right.norm(dim=1)
    root = singular.sqrt()
    energy = whole.square().sum()
    kept = float(singular.square().sum() / energy) if energy else 1.0
    # A rank that the weight does not have gives zeros in both factors, not 0 / 0 in one.
    return (right / root.clamp_min(1e-30)[:, None]).float(), (left * root).float(), min(kept, 1.0)
