"""Muon (Jordan et al., 2024) for factors and other matrices: steps whose singular values are all about 1.

    m ← μ m + g    u = g + μ m    O ≈ U Vᵀ of u = U S Vᵀ    p ← p (1 − lr·weight_decay) − lr·scale·O
    scale = 0.2·√max(n, k)·√(256/h)    in a model of hidden size h

O is five steps of X ← a X + b X XᵀX + c X (XᵀX)², from X = u / ‖u‖. Every X is u times a polynomial of the Gram matrix
XᵀX, so for u `[n, k]` with k < n the steps run on k × k matrices: for a factor these are as wide as the rank. The Gram
matrix squares singular values: in fp32 those below 1/500 of the norm would be lost in its rounding, just where the
polynomial, which multiplies them by 500, is steepest. Hence fp64, in which the result is that of whole matrices.

0.2·√max(n, k) makes the step as large as AdamW's usually is, so that learning rates are of a kind (Liu et al., 2025).
With √(256/h) its largest singular value does not grow with h, as that of the weights does not, and a rate that is good
at one width is at others (measured in docs/results.md). 256 is where rates were tuned first: nothing changes there.
`normalize: spectron` (Janson et al., 2026) divides the step of a pair by ‖factor_out‖₂ + ‖factor_in‖₂ + 1.

The optimizer here is element-wise, as ZeRO's flat partitions require: it moves momenta, and all that is no matrix by
AdamW. At the end of its step it calls `move_matrices`, which `elas.engine.muon_cycle` gives it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from elas.config import OptimizerConfig
from elas.optim.adamw import Guarded, never, parameter_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of a step (Jordan's): the fastest growth of small singular values, at the price of results in 0.7 … 1.2."""
SQUARINGS = 24
"""With which the largest eigenvalue is found by products."""
RMS, WIDTH = 0.2, 256
"""Root mean square of an entry of a step, as of AdamW's, in a model of this hidden size."""


def orthogonalized(u: Tensor, steps: int) -> Tensor:
    """U Vᵀ of u = U S Vᵀ, about: singular values that are not tiny become 0.7 … 1.2.

    Args:
        u: `[…, n, k]`, any dtype; a batch of matrices.
        steps: of the iteration.

    Returns:
        The same shape, fp64; zero where u is.
    """
    if u.dim() == 3 and len(u) == 1:  # a batched product takes longer on a CPU
        return orthogonalized(u[0], steps)[None]
    x = u.double()
    wide = x.shape[-2] < x.shape[-1]
    if wide:
        x = x.mT
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-150)
    found = (x @ _polynomial(x.mT @ x / norm.square(), steps)) / norm
    return found.mT if wide else found


def _polynomial(gram: Tensor, steps: int) -> Tensor:
    """q with X·q the result of the iteration from X, by XᵀX `[…, k, k]`, fp64."""
    a, b, c = COEFFICIENTS
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    q = None
    for number in range(steps):
        one = a * eye + b * gram + c * (gram @ gram)
        q = one if q is None else q @ one
        if number < steps - 1:
            gram = one @ gram @ one
    assert q is not None
    return q


def spectral_norms(weights: Sequence[Tensor]) -> list[Tensor]:
    """The largest singular value of each of `weights`, `[n, k]`; 0-dim fp64."""
    found: dict[int, Tensor] = {}
    for numbers, x in batches(weights):
        gram = x.mT @ x
        # On a GPU eigvalsh makes the host wait for every matrix; on a CPU it takes half as long as the products would.
        largest = largest_by_squaring(gram) if gram.is_cuda else torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0)
        found.update(zip(numbers, largest.sqrt().unbind(), strict=True))
    return [found[number] for number in range(len(weights))]


def largest_by_squaring(gram: Tensor) -> Tensor:
    """The largest eigenvalue of each `gram [b, k, k]`, symmetric and not negative, by products; `[b]`, never too large.

    The mean of eigenvalues λ weighted by λ^N, N = 2²⁴. At worst, which is all others at the same distance of 1/N, it is
    log(k)/N too small: 4e-7 of it at k = 1024.
    """
    power = gram / _trace(gram)
    for _ in range(SQUARINGS):
        power = power @ power
        power = power / _trace(power)
    return (power * gram).sum((-2, -1))


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-150)[:, None, None]


def matrix_steps(
    directions: Sequence[Tensor], *, lr: float, steps: int, hidden_size: int, divisors: Sequence[float | Tensor]
) -> list[Tensor]:
    """What is subtracted from each of some matrices.

    Args:
        directions: u of each, `[n, k]`.
        lr: learning rate.
        steps: of the iteration.
        hidden_size: of the model.
        divisors: of each step, such as spectron's; 0-dim if a tensor.

    Returns:
        fp32, of the directions' shapes.
    """
    found: dict[int, Tensor] = {}
    for numbers, batch in batches(directions):
        scale = lr * RMS * (batch.shape[-2] * WIDTH / hidden_size) ** 0.5
        for number, result in zip(numbers, orthogonalized(batch, steps).unbind(), strict=True):
            upright = (result * (scale / divisors[number])).float()
            found[number] = upright if _is_upright(directions[number]) else upright.T
    return [found[number] for number in range(len(directions))]


def batches(matrices: Sequence[Tensor], together: bool | None = None) -> Iterator[tuple[list[int], Tensor]]:
    """`matrices` upright, fp64, as batches `[b, n, k]`, n ≥ k, with the positions of what is in each.

    Args:
        matrices: `[n, k]` or `[k, n]` each.
        together: all of one shape are a batch, else each is one; by default on a GPU, where a launch takes longer than
            such a product. On a CPU batched products are up to a fifth slower.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        one_batch = matrix.is_cuda if together is None else together
        key = (max(matrix.shape), min(matrix.shape)) if one_batch else (number,)
        alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        upright = [one if _is_upright(one) else one.T for one in (matrices[number] for number in numbers)]
        yield numbers, torch.stack(upright).double()


def _is_upright(matrix: Tensor) -> bool:
    return matrix.shape[0] >= matrix.shape[1]


def apply_step(weight: Tensor, step: Tensor, decay: float) -> None:
    """weight ← weight (1 − decay) − step in place, any part of a matrix, fp32; rounded once."""
    weight.copy_(weight.double().mul_(1 - decay).sub_(step))


class Muon(Guarded):
    """Momenta of matrices (groups with `muon`), and AdamW's steps of all else.

    Args:
        groups: from `muon_groups`.
        momentum: μ.
        betas, eps: of AdamW.
        blocked: as of `Guarded`.

    Attributes:
        directions: u of every tensor with matrices that a step has moved the momentum of, while matrices are moved.
        move_matrices: is called with the learning rate then; it moves what `directions` has.
        seconds: that steps took; ZeRO takes one for each group of parameters.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        blocked: Callable[[], bool] = never,
    ):
        defaults = dict(lr=0.0, momentum=momentum, betas=betas, eps=eps, weight_decay=0.0, muon=False, rate=1.0)
        super().__init__(groups, blocked=blocked, defaults=defaults)
        self.directions: dict[Tensor, Tensor] = {}
        self.move_matrices: Callable[[float], None] | None = None
        self.seconds = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Momenta of matrices, and then the matrices; AdamW's step of all else."""
        if self.blocked():
            return None
        begun = time.perf_counter()
        self.clip()
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._momentum if group["muon"] else self._adamw)(p, p.grad.float(), group)
        if self.directions and self.move_matrices is not None:  # not in the step that ZeRO takes while it sets up
            self.move_matrices(next(group["lr"] for group in self.param_groups if group["muon"]))
        self.directions.clear()
        self.seconds += time.perf_counter() - begun
        return loss

    def _momentum(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        state["exp_avg"].mul_(group["momentum"]).add_(grad)
        self.directions[p] = grad.add(state["exp_avg"], alpha=group["momentum"])

    def _adamw(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
        state["step"] += 1
        step, lr = float(state["step"]), group["lr"] * group["rate"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1**step))


def muon_groups(
    model: torch.nn.Module, matrices: Iterable[torch.nn.Parameter], weight_decay: float, rate: float
) -> list[dict]:
    """AdamW's two groups, whose learning rate is `rate` times the optimizer's, and before them the matrices."""
    chosen, groups = {id(p) for p in matrices}, []
    for group in parameter_groups(model, weight_decay):
        inside = [p for p in group["params"] if id(p) in chosen]
        outside = [p for p in group["params"] if id(p) not in chosen]
        groups += [{**group, "params": inside, "muon": True}, {**group, "params": outside, "rate": rate}]
    return [group for group in groups if group["params"]]


def build_muon(
    model: torch.nn.Module,
    matrices: Iterable[torch.nn.Parameter],
    config: OptimizerConfig,
    *,
    blocked: Callable[[], bool] = never,
) -> Muon:
    """Muon over `model`; as AdamW's, its learning rate starts at 0.

    Args:
        model: the module given to DeepSpeed.
        matrices: those of its parameters that Muon moves.
        config: momentum, rates, betas, eps, weight decay.
        blocked: as of `Guarded`.
    """
    rate = 1.0 if config.lr_other is None else config.lr_other / config.lr
    groups = muon_groups(model, matrices, config.weight_decay, rate)
    betas = (config.beta1, config.beta2)
    return Muon(groups, momentum=config.momentum, betas=betas, eps=config.eps, blocked=blocked)
