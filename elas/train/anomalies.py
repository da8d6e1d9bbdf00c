"""Anomalous steps: non-finite numbers and loss spikes."""

import math
import statistics
from collections import deque

WINDOW, LEAST = 50, 20
"""The median is over at most the last `WINDOW` losses; with fewer than `LEAST` there is no spike."""


class BadSteps:
    """Counts steps that were skipped because their loss or gradient norm was not finite.

    Attributes:
        consecutive: bad steps up to now without a good one between them.
        total: bad steps of this start.
    """

    def __init__(self):
        self.consecutive = self.total = 0

    def note(self, loss: float, norm: float) -> bool:
        """Count a step; returns whether it was bad. Loss and norm must be the same on every rank."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.consecutive = self.consecutive + 1 if bad else 0
        self.total += bad
        return bad

    def metrics(self) -> dict[str, int]:
        """Entry for metrics.jsonl; empty until there is a bad step."""
        return {"skipped_steps": self.total} if self.total else {}


class Spikes:
    """Detects loss spikes.

    Args:
        nats: nats above the median of the last `WINDOW` losses that count as a spike.
    """

    def __init__(self, nats: float):
        self.nats, self.rollbacks = nats, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def note(self, loss: float) -> float | None:
        """Record a loss; for a spike, which is not recorded, returns the median of the losses before it, else None."""
        median = statistics.median(self._losses) if len(self._losses) >= LEAST else None
        if median is not None and loss > median + self.nats:
            return median
        self._losses.append(loss)
        return None

    def rolled_back(self) -> None:
        """Count a rollback and forget the losses."""
        self.rollbacks += 1
        self._losses.clear()

    def metrics(self) -> dict[str, int]:
        """Entry for metrics.jsonl; empty until there is a rollback."""
        return {"rollbacks": self.rollbacks} if self.rollbacks else {}
