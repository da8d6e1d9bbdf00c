"""Steps that go wrong: numbers that are not finite, and losses that jump."""

import math
import statistics
from collections import deque

WINDOW, LEAST = 50, 20
"""Losses that a spike is judged by: so many at most, so many at least."""


class BadSteps:
    """Steps that were skipped because their loss or gradient norm was no finite number."""

    def __init__(self):
        self.in_a_row = self.in_all = 0

    def note(self, loss: float, norm: float) -> bool:
        """Count a step, the same on every rank; whether it was bad."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.in_all += bad
        return bad

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl, once there is one."""
        return {"skipped_steps": self.in_all} if self.in_all else {}


class Spikes:
    """Losses far above those before them.

    Args:
        nats: how far above the median of the last `WINDOW` losses a spike begins.
    """

    def __init__(self, nats: float):
        self.nats, self.rollbacks = nats, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def note(self, loss: float) -> float | None:
        """Note the loss of a step; the median that it is a spike over, or None."""
        usual = statistics.median(self._losses) if len(self._losses) >= LEAST else None
        if usual is not None and loss > usual + self.nats:
            return usual
        self._losses.append(loss)
        return None

    def rolled_back(self) -> None:
        """Count a return to a checkpoint, and forget the losses."""
        self.rollbacks += 1
        self._losses.clear()

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl, once there is one."""
        return {"rollbacks": self.rollbacks} if self.rollbacks else {}
