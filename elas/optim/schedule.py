"""Learning rate as a pure function of the step, so that a resumed run needs nothing but the step number."""

import math

from elas.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of one step.

    Args:
        step: number of the step, from 1.
        total_steps: steps of the whole run.
        optimizer: gives the peak `lr`.
        schedule: kind, warm-up, decay and final ratio.

    Returns:
        `lr · step / warmup` during the warm-up; then, for `cosine`, half a cosine down to `min_lr_ratio · lr` at the
        last step; for `wsd`, `lr` until the last `decay_steps`, then a straight line down to it; for `constant`, `lr`.
    """
    peak, low = optimizer.lr, optimizer.lr * schedule.min_lr_ratio
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay = schedule.decay_steps if schedule.decay_steps is not None else max(1, total_steps // 10)
        left = total_steps - step
        return peak if left >= decay else low + (peak - low) * max(left, 0) / decay
    done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
