"""Columns of a run's rows as arrays, thinned to what a chart can show.

Of each interval the rows with the smallest and the largest value stay, so that no spike is lost; averaging would hide
it.
"""

from array import array
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from elas.report.run_files import Row, RunFiles

AXES = ("tokens", "step", "hours", "flops")
"""What a chart can be drawn over."""
Columns = dict[str, Any]


def column(rows: list[Row], key: str) -> np.ndarray:
    """Values of a key, fp64 [rows]; NaN where a row has none."""
    try:
        values = list(map(itemgetter(key), rows))
    except KeyError:
        values = [row.get(key) for row in rows]
    return _array(values)


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
        self._began, self._rows = run.began, run.metrics
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

    @property
    def end(self) -> dict[str, float]:
        """The last step of metrics.jsonl on every axis."""
        return {name: float(values[-1]) for name, values in self.of(self._rows).items()}

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
    edges = np.linspace(0, length, buckets + 1).astype(int)
    kept = [np.array([0, length - 1])]
    for name in values:
        missing = np.isnan(columns[name])
        kept += [_smallest(np.where(missing, np.inf, sign * columns[name]), edges) for sign in (1.0, -1.0)]
    rows = np.unique(np.concatenate(kept))
    return {name: values[rows] for name, values in columns.items()}


def _smallest(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Row of the smallest value between each two edges; the first of equal ones, so that a gap of infinities stays."""
    least = np.repeat(np.minimum.reduceat(values, edges[:-1]), np.diff(edges))
    found = np.flatnonzero(values == least)
    _, first = np.unique(np.searchsorted(edges, found, side="right"), return_index=True)
    return found[first]


def by_layer(rows: list[Row], key: str, buckets: int) -> tuple[np.ndarray, tuple[float, float]] | None:
    """A value by layer over time: means over intervals of equally many tokens.

    Args:
        rows: of metrics.jsonl.
        key: of their `layers`.
        buckets: intervals.

    Returns:
        fp64 [layers, intervals], NaN where there is none; and first and last number of tokens. None without values.
    """
    found = [of_row.get(key) if isinstance(of_row := row.get("layers"), dict) else None for row in rows]
    if not all(found):
        rows = [row for row, one in zip(rows, found) if one]
    lists = [one for one in found if one]
    if not lists:
        return None
    lengths = set(map(len, lists))
    layers = max(lengths)
    if len(lengths) > 1:
        lists = [[*one, *[None] * (layers - len(one))] for one in lists]
    if set(map(type, lists)) == {array}:  # of `run_files`
        packed: list[Any] = lists
        values = np.frombuffer(b"".join(packed)).reshape(len(rows), layers)
    else:
        values = _array(list(chain.from_iterable(lists))).reshape(len(rows), layers)
    if np.isnan(values).all():
        return None
    tokens = column(rows, "tokens")
    buckets = max(1, min(buckets, len(rows) // 2))  # fewer than rows, which are not evenly spaced
    span = max(tokens[-1] - tokens[0], 1.0)
    number = np.minimum(((tokens - tokens[0]) / span * buckets).astype(int), buckets - 1)
    known = ~np.isnan(values)
    sums, counts = (
        np.array([np.bincount(number, of_layer, buckets) for of_layer in each.T])
        for each in (np.where(known, values, 0.0), known)
    )
    with np.errstate(invalid="ignore"):
        return sums / counts, (float(tokens[0]), float(tokens[0] + span))
