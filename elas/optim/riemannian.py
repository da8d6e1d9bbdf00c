"""LORO's exact step: move `W = M Nᵀ` along a tangent direction and come back to rank r with balanced factors.

Shapes: `M [o, r]`, `N [i, r]`, and their directions `D_M [o, r]`, `D_N [i, r]`: gradients, or Adam's D.

With M = U R_M and N = V R_N (QR), a gradient G of W has `D_M = G N` and `D_N = Gᵀ M`, so `G V = D_M R_N⁻¹` and
`Uᵀ G = R_M⁻ᵀ D_Nᵀ`. The tangent space of the rank-r matrices at W takes of G the part

    P(G) = U K₀ Vᵀ + U Y₁ᵀ + Y₂ Vᵀ      K₀ = Uᵀ G V      Y₁ = (Uᵀ G − K₀ Vᵀ)ᵀ      Y₂ = G V − U K₀

and the new factors are the two halves, with Σ^½ each, of the rank-r truncation of

    W − lr·P(G) = [U Y₂] [[R_M R_Nᵀ − lr·K₀, −lr·I], [−lr·I, 0]] [V Y₁]ᵀ

which after a QR of each bracket is the SVD of one 2r × 2r matrix. (arXiv 2605.03667 and LORO write the same with
separate QRs of Y₁ and Y₂; together with U and V they also serve o < 2r, where those bases would not be orthogonal.)
"""

import torch
from torch import Tensor


class NotTaken(ArithmeticError):
    """A pair for which the exact step fails: a factor without full rank, or an SVD that does not converge."""


def exact_step(m: Tensor, n: Tensor, d_m: Tensor, d_n: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One Riemannian step of a factor pair.

    Args:
        m: `[o, r]`, fp32 or fp64, full rank, r ≤ o.
        n: `[i, r]`, likewise.
        d_m: direction of M: the gradient G N, or a preconditioned one.
        d_n: direction of N: the gradient Gᵀ M, likewise.
        lr: step size.

    Returns:
        New M and N with `MᵀM = NᵀN` diagonal and descending. Each column of M has its entry of largest magnitude (the
        first of equals) positive, so that the result does not depend on signs an SVD is free to choose.

    Raises:
        NotTaken: rank-deficient factors (a diagonal entry of R at or below rounding), an SVD that does not converge, or
            directions that are not finite.
    """
    (u, r_m), (v, r_n) = torch.linalg.qr(m), torch.linalg.qr(n)
    for name, r, rows in (("M", r_m, m.shape[0]), ("N", r_n, n.shape[0])):
        diagonal = r.diagonal().abs()
        if not diagonal.min() > torch.finfo(m.dtype).eps * rows * diagonal.max():
            raise NotTaken(f"{name} has not full rank")
    gv = torch.linalg.solve_triangular(r_n, d_m, upper=True, left=False)
    utg = torch.linalg.solve_triangular(r_m.T, d_n.T, upper=False)
    k0 = utg @ v
    y1, y2 = (utg - k0 @ v.T).T, gv - u @ (u.T @ gv)  # of preconditioned directions, uᵀ gv is not k0
    identity = torch.eye(m.shape[1], dtype=m.dtype, device=m.device)
    core = torch.cat([
        torch.cat([r_m @ r_n.T - lr * k0, -lr * identity], 1),
        torch.cat([-lr * identity, torch.zeros_like(identity)], 1),
    ])  # fmt: skip
    (q_m, t_m), (q_n, t_n) = torch.linalg.qr(torch.cat([u, y2], 1)), torch.linalg.qr(torch.cat([v, y1], 1))
    try:
        a, sigma, bt = torch.linalg.svd(t_m @ core @ t_n.T, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage] public in torch's reference
        raise NotTaken(f"the SVD failed ({error})") from error
    rank = m.shape[1]
    root = sigma[:rank].sqrt()
    new_m, new_n = q_m @ a[:, :rank] * root, q_n @ bt[:rank].T * root
    if not (torch.isfinite(new_m).all() and torch.isfinite(new_n).all()):
        raise NotTaken("the result is not finite")
    sign = torch.sign(new_m.gather(0, new_m.abs().argmax(0, keepdim=True)))
    sign = torch.where(sign == 0, 1, sign)
    return new_m * sign, new_n * sign
