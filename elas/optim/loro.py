"""LORO (arXiv 2605.03667): AdamW whose factors move by `c = r / hidden_size`, with exact steps on the rank-r manifold.

Most steps are approximate and element by element, so they run on whatever flat fp32 partitions ZeRO hands out:

    m ← β₁m + (1−β₁)g    v ← β₂v + (1−β₂)g²    D = m / (√v + eps)    lr_t = lr·√(1−β₂ᵗ) / (1−β₁ᵗ)
    p ← p − lr_t·c·D,    then p ← p − lr·weight_decay·p

On an exact step the factors' moments move but not the factors (`moments_only`); `elas.engine.loro_cycle` then moves
them pair by pair, and a refresh zeroes the moments and the step counts of all parameters.
"""

from collections.abc import Callable, Iterable

import torch

from elas.config import OptimizerConfig
from elas.optim.adamw import Guarded, never, parameter_groups

FACTOR = "factor_"


def factor_scale(rank: int, hidden_size: int) -> float:
    """c, the factors' share of the learning rate in an approximate step."""
    return rank / hidden_size


def build_loro(
    model: torch.nn.Module, config: OptimizerConfig, *, scale: float, blocked: Callable[[], bool] = never
) -> "Loro":
    """LORO's optimizer over `model`; as AdamW's, its learning rate starts at 0.

    Args:
        model: the module given to DeepSpeed.
        config: betas, eps, weight decay.
        scale: from `factor_scale`.
        blocked: as of `Guarded`.
    """
    groups = loro_groups(model, config.weight_decay, scale)
    return Loro(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, blocked=blocked)


def loro_groups(model: torch.nn.Module, weight_decay: float, scale: float) -> list[dict]:
    """AdamW's two groups, and before them the factors, which move by `scale` times the learning rate."""
    factors = {id(p) for name, p in model.named_parameters() if FACTOR in name}
    groups = []
    for group in parameter_groups(model, weight_decay):
        inside = [p for p in group["params"] if id(p) in factors]
        outside = [p for p in group["params"] if id(p) not in factors]
        groups += [{**group, "params": inside, "c": scale, "factor": True}, {**group, "params": outside, "c": 1.0}]
    return [group for group in groups if group["params"]]


class Loro(Guarded):
    """The approximate steps, and the moments of all.

    Args:
        groups: from `loro_groups`.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second moment, which is not bias-corrected.
        blocked: as of `Guarded`.

    Attributes:
        moments_only: while set, factors (groups with `factor`) keep their values.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        blocked: Callable[[], bool] = never,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, c=1.0, factor=False)
        super().__init__(groups, blocked=blocked, defaults=defaults)
        self.moments_only = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One approximate step of every parameter that has a gradient."""
        if self.blocked():
            return None
        self.clip()
        loss = None if closure is None else closure()
        for group in self.param_groups:
            stay = self.moments_only and group["factor"]
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), group, stay)
        return loss

    def _update(self, p: torch.Tensor, grad: torch.Tensor, group: dict, stay: bool) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if stay:
            return
        direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        p.add_(direction, alpha=-corrected(group["lr"], group["betas"], float(state["step"])) * group["c"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def corrected(lr: float, betas: tuple[float, float], step: float) -> float:
    """`lr·√(1−β₂ᵗ) / (1−β₁ᵗ)`, the step size at the t-th step since the last refresh; 0 before the first."""
    if step < 1:
        return 0.0
    return lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)


@torch.no_grad()
def refresh(state: Iterable[dict]) -> None:
    """Forget moments and step counts."""
    for one in state:
        for value in one.values():
            value.zero_()
