"""AdamW with decoupled weight decay on matrices only."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from elas.config import OptimizerConfig


def never() -> bool:
    """False, for optimizers that nothing blocks."""
    return False


class Guarded(torch.optim.Optimizer):
    """A mix-in for optimizers: `step` does nothing while `blocked()`, and scales gradients before it uses them.

    Args:
        groups: as of the optimizer that it is mixed into.
        blocked: called before every step; gradients that are not finite must not reach weights or moments.
        settings: of the optimizer that it is mixed into.

    Attributes:
        clip_scale: 0-dim fp32 tensor that the next step's gradients are multiplied by, in their own (fp32) copy; None
            where DeepSpeed clips (ZeRO 1 to 3).
    """

    def __init__(self, groups: Iterable[dict], *, blocked: Callable[[], bool] = never, **settings: Any):
        self.blocked = blocked
        self.clip_scale: torch.Tensor | None = None
        super().__init__(groups, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, unless it is blocked."""
        if self.blocked():
            return None
        self.clip()
        return super().step(closure)  # of the optimizer that this is mixed into

    @torch.no_grad()
    def clip(self) -> None:
        """Multiply the gradients by `clip_scale`, once."""
        scale, self.clip_scale = self.clip_scale, None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage] no public name for it


class AdamW(Guarded, torch.optim.AdamW):
    """torch's, guarded."""


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and vectors (norm weights), which do not; an empty group is left out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    model: torch.nn.Module, config: OptimizerConfig, *, offload: bool = False, blocked: Callable[[], bool] = never
) -> Guarded:
    """AdamW over `model`.

    Args:
        model: the module given to DeepSpeed.
        config: betas, eps, weight decay. The learning rate starts at 0: whoever steps sets it before each step, and a
            step that DeepSpeed takes by itself while it sets up changes no weight.
        offload: the optimizer state lives on the CPU beside a GPU model; DeepSpeed's CPU Adam (compiled) serves that.
        blocked: as of `Guarded`.
    """
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = dict(lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, blocked=blocked)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return type("CPUAdamW", (Guarded, DeepSpeedCPUAdam), {})(groups, adamw_mode=True, **settings)
    return AdamW(groups, fused=True, **settings)
