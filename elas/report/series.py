"""Columns of a run's rows as arrays, thinned to what a chart can show.

Of each interval the rows with the smallest and the largest value stay, so that no spike is lost; averaging would hide
it.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from elas.report.run_files import Row, RunFiles

AXES = ("tokens", "step", "hours", "flops")
"""What a chart can be drawn over."""
Columns = dict[str, Any]


def column(rows: list[Row], key: str) -> np.ndarray:
    """Values of a key, fp64 [rows]; NaN where a row has none."""
    return _array([row.get(key) for row in rows])


def _array(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        return np.array([_value(value) for value in values], dtype=np.float64)


def _value(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


class Axes:
    """Where the steps of a run are on each axis.

    Args:
        run: with at least one row of metrics.
    """

    def __init__(self, run: RunFiles):
        self._began = run.began
        self._known: dict[int, Columns] = {}
        self._step, self._tokens = column(run.metrics, "step"), column(run.metrics, "tokens")
        flops = column(run.metrics, "flops")
        each = flops[-1] / self._tokens[-1] if self._tokens[-1] else float("nan")
        self._flops_per_token = float(each)

    def of(self, rows: list[Row]) -> Columns:
        """Every axis of AXES for all rows of a file of the run; runs without FLOPs have NaN there."""
        if id(rows) not in self._known:
            self._known[id(rows)] = self.at(column(rows, "step"), column(rows, "time"))
        return self._known[id(rows)]

    def at(self, step: np.ndarray, time: np.ndarray) -> Columns:
        """Every axis for steps and times."""
        tokens = np.interp(step, np.r_[0.0, self._step], np.r_[0.0, self._tokens])
        return {
            "tokens": tokens,
            "step": step,
            "hours": (time - self._began) / 3600,
            "flops": tokens * self._flops_per_token,
        }


def thin(columns: Columns, values: list[str], buckets: int) -> Columns:
    """At most 2 · buckets · len(values) rows of columns of one length, in order.

    Args:
        columns: by name.
        values: names of the columns whose smallest and largest value of each bucket stay.
        buckets: intervals of equally many rows.
    """
    length = len(columns[values[0]])
    if length <= 2 * buckets:
        return columns
    kept = {0, length - 1}
    edges = np.linspace(0, length, buckets + 1).astype(int)
    for name in values:
        for low, high in pairwise(edges):
            part = columns[name][low:high]
            if np.isnan(part).all():
                kept.add(int(low))  # so that a gap stays one
            else:
                kept |= {int(low + np.nanargmin(part)), int(low + np.nanargmax(part))}
    rows = np.array(sorted(kept))
    return {name: values[rows] for name, values in columns.items()}


def by_layer(rows: list[Row], key: str, buckets: int) -> tuple[np.ndarray, tuple[float, float]] | None:
    """A value by layer over time: means over intervals of equally many tokens.

    Args:
        rows: of metrics.jsonl.
        key: of their `layers`.
        buckets: intervals.

    Returns:
        fp64 [layers, intervals], NaN where there is none; and first and last number of tokens. None without values.
    """
    rows = [row for row in rows if isinstance(row.get("layers"), dict) and row["layers"].get(key)]
    if not rows:
        return None
    layers = max(len(row["layers"][key]) for row in rows)
    lists = [row["layers"][key] for row in rows]
    if any(len(one) != layers for one in lists):
        lists = [[*one, *[None] * (layers - len(one))] for one in lists]
    values = _array([value for one in lists for value in one]).reshape(len(rows), layers)
    if np.isnan(values).all():
        return None
    tokens = column(rows, "tokens")
    buckets = max(1, min(buckets, len(rows) // 2))  # fewer than rows, which are not evenly spaced
    span = max(tokens[-1] - tokens[0], 1.0)
    number = np.minimum(((tokens - tokens[0]) / span * buckets).astype(int), buckets - 1)
    sums, counts = np.zeros((buckets, layers)), np.zeros((buckets, layers))
    np.add.at(sums, number, np.nan_to_num(values))
    np.add.at(counts, number, ~np.isnan(values))
    with np.errstate(invalid="ignore"):
        return (sums / counts).T, (float(tokens[0]), float(tokens[0] + span))
