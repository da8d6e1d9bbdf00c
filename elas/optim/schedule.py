"""Learning rate as a pure function of the step, so that a resumed run needs nothing but the step number."""

import math
from dataclasses import replace

from elas.config import OptimizerConfig, ScheduleConfig

RAMP_STEPS = 5
"""Steps from nearly 0 back to the curve after a refresh."""


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of one step.

    Args:
        step: number of the step, from 1.
        total_steps: steps of the whole run.
        optimizer: gives the peak `lr`.
        schedule: kind, warm-up, decay and final ratio.

    Returns:
        `lr · step / warmup` during the warm-up; then, for `cosine`, half a cosine down to `min_lr_ratio · lr` at the
        last step; for `cosine_restart` the same, times k/5 in the k-th of the 5 steps after each refresh of the
        moments (every `optimizer.exact_every` steps); for `wsd`, `lr` until the last `decay_steps`, then a straight
        line down to it; for `constant`, `lr`.
    """
    if schedule.kind == "cosine_restart":
        assert optimizer.exact_every is not None  # `elas.config.rules` requires it
        since = (step - 1) % optimizer.exact_every + 1
        ramp = min(1.0, since / RAMP_STEPS) if step > optimizer.exact_every else 1.0
        return ramp * learning_rate(step, total_steps, optimizer, replace(schedule, kind="cosine"))
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
