"""Exact deduplication: finds all but the first of the documents with identical text, by a digest of the text.

Digests are compared one range of values at a time, so memory is bounded for any number of documents.
"""

from collections.abc import Iterator

import numpy as np

from elas.data_prep.plan import Plan
from elas.data_prep.shards import DOCUMENT, part_path

ROWS_AT_ONCE = 4_000_000
"""Digests held in memory at a time: about 250 MB including the sort."""


def find_duplicates(plan: Plan, side: str) -> tuple[np.ndarray, int]:
    """Find the duplicates on one side; copies are always on the same side, which depends on the text alone.

    Returns:
        bool `[documents]`, False for duplicates, memory-mapped from the work folder; and the number of duplicates.
    """
    total = sum(part_path(plan.work, task, f"{side}.docs").stat().st_size for task in range(len(plan.tasks)))
    total //= DOCUMENT.itemsize
    if not total:
        return np.ones(0, bool), 0
    keep = np.lib.format.open_memmap(plan.work / f"{side}.kept.npy", "w+", bool, (total,))
    keep[:] = True
    ranges = -(-total // ROWS_AT_ONCE)
    copies = 0
    for part in range(ranges):
        digests, positions = [], []
        done = 0
        for rows in _rows(plan, side):
            mine = rows["digest"][:, 0] % np.uint64(ranges) == part
            digests.append(rows["digest"][mine])
            positions.append(done + np.flatnonzero(mine))
            done += len(rows)
        values, places = np.concatenate(digests), np.concatenate(positions)
        order = np.lexsort((places, values[:, 1], values[:, 0]))
        values = values[order]
        same = np.concatenate(([False], (values[1:] == values[:-1]).all(1)))
        keep[places[order][same]] = False
        copies += int(same.sum())
    return keep, copies


def _rows(plan: Plan, side: str) -> Iterator[np.ndarray]:
    for task in range(len(plan.tasks)):
        with open(part_path(plan.work, task, f"{side}.docs"), "rb") as file:
            while data := file.read((1 << 16) * DOCUMENT.itemsize):
                yield np.frombuffer(data, DOCUMENT)
