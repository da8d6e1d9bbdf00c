"""Requests to stop a run: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP, or a time budget.

A signal only sets a flag. A separate thread does that, because Python runs signal handlers in the main thread, which
may be inside a collective or a long kernel. The flags reach the other ranks with the watchdog's heartbeats, and all
ranks agree on them in each step, and between the micro-batches of slow steps (`elas.engine.micro_batches`). Then all
save and end, and the launcher reads `RUN_DIR/DONE` or `RUN_DIR/REQUEUE`.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from elas.console import Console
from elas.failed_rank import FailedRanks
from elas.train.standing import Standing

_REASONS = ("", "train.stop_after_minutes is over", "SIGHUP", "SIGUSR1", "SIGINT", "SIGTERM")
_SIGNALS = {number: _REASONS.index(number.name) for number in
            (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)}  # fmt: skip
_SAME_S = 2.0
"""Seconds within which a repeated signal counts once: launcher and terminal may both send it to a rank."""
_SAME_ALONE_S = 0.15
"""The same without a launcher."""


@dataclass(frozen=True)
class Agreement:
    """What the flags of all ranks say, the same on every rank.

    Attributes:
        why: the reason to stop; empty to continue.
        busy: whether any rank passed `waiting`.
        pass_s: seconds of a micro-batch, on average over the ranks.
    """

    why: str = ""
    busy: bool = False
    pass_s: float = 0.0


class StopRequest:
    """Whether this process was asked to stop; a context manager in which signals only set a flag.

    The same signal again ends the process at once, with status 128 + its number. SIGTERM after SIGUSR1, as schedulers
    send it, changes nothing. A SIGHUP that is ignored (nohup) stays ignored.

    Args:
        minutes: time budget in minutes from now on; None for none.
        say: prints a line; called from another thread.
        standing: called to find out what of the run is saved; from another thread too.

    Attributes:
        failed: ranks of this host that have failed since this was created.
    """

    def __init__(
        self,
        minutes: float | None,
        say: Callable[[str], None] = lambda text: None,
        standing: Callable[[], Standing] = Standing.at_start,
    ):
        self.failed = FailedRanks()
        self._standing = standing
        self._say = say
        self._signal = 0  # index of the reason
        self._lock = threading.Lock()
        self._noted: dict[int, float] = {}
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._same_s = _SAME_S if "MASTER_ADDR" in os.environ else _SAME_ALONE_S

    def __enter__(self) -> "StopRequest":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        wanted = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        # The handlers do nothing, but Python writes a signal to the wakeup fd only if it has a Python handler.
        self._before = {number: signal.signal(number, lambda _number, _frame: None) for number in wanted}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._write.close()  # ends the thread
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in _SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if now - self._noted.setdefault(number, now) > self._same_s:
            name = signal.Signals(number).name
            if int(os.environ.get("RANK", "0")) == 0:
                lost = self._standing().lost()
                Console("err").last(f"\nerror: ended at once by the second {name}; {lost}")
            os._exit(128 + number)
        if number == signal.SIGTERM and self.failed.first():
            return  # the launcher ends the ranks because one failed; nothing can be saved, the watchdog reports why
        self.hear(_SIGNALS[signal.Signals(number)])

    def hear(self, reason: int) -> None:
        """Set the flag for a signal that this or another rank (its `signalled`) received; only the first one counts."""
        with self._lock:
            if self._signal or not reason:
                return
            self._signal = reason
        standing = self._standing()
        again = f"the same signal again ends it at once, and then {standing.lost()}"
        self._say(f"stopping ({_REASONS[reason]}): {standing.plan()}; {again}")

    @property
    def signalled(self) -> int:
        """The signal this rank knows of, as the number that `hear` takes on other ranks; 0 for none."""
        return self._signal

    def flags(self, waiting: bool, pass_s: float = 0.0) -> list[float]:
        """What this rank contributes to an agreement: numbers to sum over all ranks.

        Args:
            waiting: whether this rank is still busy with something that all ranks must complete first.
            pass_s: seconds of a micro-batch on this rank.
        """
        over = self._end is not None and time.monotonic() >= self._end
        mine = self._signal or int(over)
        return [*(float(reason == mine) for reason in range(1, len(_REASONS))), float(waiting), pass_s]

    def agreed(self, sums: list[float]) -> Agreement:
        """What the sums of all ranks' `flags` say; every rank must call it with the same sums."""
        *ranks_with, waiting, seconds = sums
        reason = max((reason for reason, ranks in enumerate(ranks_with, 1) if ranks), default=0)
        if reason in _SIGNALS.values():
            self.hear(reason)  # so that rank 0 prints the line, whichever rank received the signal
        return Agreement(_REASONS[reason], waiting > 0, seconds / dist.get_world_size())

    def agree(self, waiting: bool, pass_s: float = 0.0) -> Agreement:
        """Exchange `flags` apart from a step, which sums them with its loss; every rank must call it."""
        return self.agreed(_sums(self.flags(waiting, pass_s), None))

    def agree_on_signal(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any rank of a group knows of a signal; every rank of it must call this. Ignores the time budget."""
        return _sums([float(self._signal > 0)], group)[0] > 0


def _sums(values: list[float], group: dist.ProcessGroup | None) -> list[float]:
    if dist.get_world_size(group) == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(sums, group=group)
    return sums.tolist()
