"""Asking a run to stop: SIGTERM, SIGUSR1, a time budget; and the markers that say how it ended.

A signal only sets a flag. The ranks agree on it after each step, so all of them finish the same step, save and leave;
whoever started the run reads `RUN_DIR/DONE` or `RUN_DIR/REQUEUE`.
"""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elas.cli import write_json
from elas.config import Config

DONE, REQUEUE = "DONE", "REQUEUE"
_REASONS = ("", "train.stop_after_minutes is over", "SIGUSR1", "SIGTERM")
_SAME_S = 2.0
_SIGNALS = {signal.SIGUSR1: 2, signal.SIGTERM: 3}


class StopRequest:
    """Whether somebody asked this process to stop; while it is entered, signals do no more than that.

    The same signal again ends the process at once, with 128 + its number; not so within two seconds, as a launcher and
    whoever started it may both hand one on. SIGTERM after SIGUSR1 is what a scheduler does, and changes nothing.

    Args:
        minutes: time budget from now on; None for none.
    """

    def __init__(self, minutes: float | None):
        self._wanted = 0
        self._noted: dict[int, float] = {}
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if now - self._noted.setdefault(number, now) > _SAME_S:
            os._exit(128 + number)
        self._wanted = max(self._wanted, _SIGNALS[number])

    def agree(self, waiting: bool) -> tuple[str, bool]:
        """Exchange flags; every rank calls it.

        Args:
            waiting: whether this rank is still busy with something that all must have done.

        Returns:
            Why to stop, empty to go on; and whether some rank is busy. The same on every rank.
        """
        over = self._end is not None and time.monotonic() >= self._end
        flags = torch.tensor([self._wanted or int(over), int(waiting)], device=torch.cuda.current_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        wanted, busy = flags.tolist()
        return _REASONS[wanted], bool(busy)


def clear_markers(config: Config) -> None:
    """Remove the markers of the run before; on rank 0."""
    for name in (DONE, REQUEUE):
        (Path(config.train.run_dir) / name).unlink(missing_ok=True)


def write_marker(config: Config, facts: dict, stopped: str) -> None:
    """Say how the run ended; on rank 0.

    Args:
        config: the run's.
        facts: `step`, `checkpoint` and what else is worth knowing.
        stopped: why it stopped before its end; empty at the end.
    """
    name = REQUEUE if stopped else DONE
    facts = {**facts, "time": time.time()}  # no two endings leave the same marker
    write_json(Path(config.train.run_dir) / name, facts | ({"stopped": stopped} if stopped else {}))
