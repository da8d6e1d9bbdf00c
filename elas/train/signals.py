"""Asking a run to stop: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP, a time budget; and the markers that say how it ended.

A signal only sets a flag, which a thread of its own does: the main one may be inside a collective or a long kernel, and
Python would let a handler wait for its end. The flags reach the other ranks with the watchdog's signs of life, and all
agree on them: after each step, and between the micro-batches of slow ones (`elas.engine.micro_batches`). Then all save
and leave; whoever started the run reads `RUN_DIR/DONE` or `RUN_DIR/REQUEUE`.
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
"""A launcher and the terminal may both hand one signal to a rank: within this time it counts once."""
_SAME_ALONE_S = 0.15


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after `StopRequest.agree`.

    Attributes:
        why: why to stop; empty to go on.
        busy: whether some rank is still writing.
        pass_s: seconds of a micro-batch on the slowest rank.
    """

    why: str
    busy: bool
    pass_s: float


class StopRequest:
    """Whether this process was asked to stop; while it is entered, signals do no more than that.

    The same signal again ends the process at once, with 128 + its number. SIGTERM after SIGUSR1 is what a scheduler
    does, and changes nothing. A SIGHUP that is ignored (nohup) stays ignored.

    Args:
        minutes: time budget from now on; None for none.
        say: writes a line for people; called from another thread.

    Attributes:
        standing: says what of the run is saved.
        failed: ranks of this host that failed since.
    """

    def __init__(self, minutes: float | None, say: Callable[[str], None] = lambda text: None):
        self.standing: Callable[[], Standing] = lambda: Standing(None, 0, unsaved=False)
        self.failed = FailedRanks()
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
        # The handlers do nothing, but without one Python hands nothing to the thread.
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
                lost = self.standing().lost()
                Console("err").say(f"\nerror: ended at once by the second {name}; {lost}")
            os._exit(128 + number)
        if number == signal.SIGTERM and self.failed.first():
            return  # a launcher ends what another rank's failure left; nothing can be saved, and the watchdog says why
        self.hear(_SIGNALS[number])

    def hear(self, reason: int) -> None:
        """Note a signal that this rank or another (`signalled`) was given; the first one counts."""
        with self._lock:
            if self._signal or not reason:
                return
            self._signal = reason
        standing = self.standing()
        again = f"the same signal again ends it at once, and then {standing.lost()}"
        self._say(f"stopping ({_REASONS[reason]}): {standing.plan()}; {again}")

    @property
    def signalled(self) -> int:
        """The signal this rank has heard of, as a number that other ranks' `hear` takes; 0 for none."""
        return self._signal

    def agree(self, waiting: bool, pass_s: float = 0.0) -> Agreement:
        """Exchange flags; every rank calls it.

        Args:
            waiting: whether this rank is still busy with something that all must have done.
            pass_s: seconds of a micro-batch on this rank.
        """
        over = self._end is not None and time.monotonic() >= self._end
        flags = [self._signal or int(over), int(waiting), round(1e6 * pass_s)]
        reason, busy, micros = _largest(flags, None)
        if reason in _SIGNALS.values():
            self.hear(reason)  # rank 0 says so, whichever rank it was given to
        return Agreement(_REASONS[reason], bool(busy), micros / 1e6)

    def agree_on_signal(self, group: dist.ProcessGroup | None) -> bool:
        """Whether a rank of a group has heard a signal; each of them calls it. A time budget lets a step finish."""
        return bool(_largest([self._signal], group)[0])


def _largest(values: list[int], group: dist.ProcessGroup | None) -> list[int]:
    if dist.get_world_size(group) == 1:
        return values
    flags = torch.tensor(values, device=torch.cuda.current_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags.tolist()
