"""How often a run writes lines, and how long its validations and saves take, by the last rows of metrics.jsonl."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from elas.config import Config


def usual_s(rows: Sequence[Mapping[str, Any]], config: Config | None) -> float | None:
    """The usual seconds between two lines of metrics.jsonl; None if unknown."""
    if gaps := gaps_s(rows):
        return statistics.median(gaps)
    step_s = rows[-1].get("step_s") if rows else None
    return step_s * config.log.every_steps if step_s and config else None


def gaps_s(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds between the lines of one start."""
    return [
        after["time"] - before["time"]
        for before, after in pairwise(rows)
        if after.get("elapsed_s", 0.0) > before.get("elapsed_s", 0.0) and after["step"] > before["step"]
    ]


def last_growth(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """By how much a sum last grew: the seconds of the last validation, or save; 0 before the first."""
    values = [float(row.get(name) or 0.0) for row in rows]
    if rows and rows[0]["step"] == 1:
        values.insert(0, 0.0)
    return next((after - before for before, after in reversed(list(pairwise(values))) if after > before), 0.0)
