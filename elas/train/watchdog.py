"""Seeing to it that a run ends when one of its ranks is gone or stuck, and says which.

A thread in every rank writes a sign of life into a store that rank 0 keeps, and reads those of the others. A process
that was killed or stopped gives none; one whose main thread is stuck gives signs but makes no progress. Either way
every rank writes the stacks of its threads to `RUN_DIR/stacks`, says which rank it was and what that did last, and ends
with status 1: nothing else could free a rank that waits in a collective. Progress is a micro-batch, or the next of a
run's other operations.

Where a guard runs this host's ranks (`elas.launch.guard.guard`), it knows at once that one has failed, and leaves that
in a file: then nothing waits for missing signs.

The same signs carry what a rank was asked to stop by, so that the others hear of it in the middle of a step.
"""

import datetime
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from elas.config import Config
from elas.console import Console
from elas.errors import Failure
from elas.train.signals import StopRequest

_LONGEST_INTERVAL, _SHORTEST_INTERVAL = 5.0, 0.2  # seconds between signs of life
_MISSED = 4
"""Signs that may be missed in a row once something else says that a rank is gone: a lost connection."""
_VERDICT = "verdict"
_LOOK_S = 0.5
"""Seconds between two looks at whether this host's guard has seen a rank fail."""
_LAST_WORDS_S = 2.0
"""What a rank that failed by an exception has said of it in the store is waited for so long."""


@dataclass
class _Seen:
    """What is known of a rank: its last sign, and since when (this host's clock) it has not changed."""

    sign: int
    progress: int
    told: str
    sign_since: float
    progress_since: float


class Watchdog:
    """Watches the ranks of a run while it is entered; without a time-out it only exchanges signs.

    Args:
        config: `train.timeout_seconds` and the run's folder.
        stop: hears the signals that other ranks were given.
        end: what ends the process, for tests.
    """

    def __init__(self, config: Config, stop: StopRequest | None = None, end: Callable[[int], None] = os._exit):
        self._stop = stop or StopRequest(None)
        self.timeout = config.train.timeout_seconds
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._folder = Path(config.train.run_dir) / "stacks"
        self._end = end
        self._now = (0, "starting", 0)  # step, operation, how many before it
        self._reachable = True
        self._verdict: str | None = None
        self._closed = threading.Event()
        self._hurry = threading.Event()  # exchange signs now
        self._suspicious = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, step: int, operation: str) -> None:
        """Say what this rank is about to do."""
        self._now = (step, operation, self._now[2] + 1)

    def __enter__(self) -> "Watchdog":
        if self.timeout is None and self.world == 1:
            return self
        timeout = 10 * _LONGEST_INTERVAL if self.timeout is None else self.timeout
        self._interval = min(_LONGEST_INTERVAL, max(_SHORTEST_INTERVAL, timeout / 10))
        self._store = _open_store(self.rank, timeout)
        self._put(0)
        dist.barrier()  # every rank has given its first sign
        now = self._exchanged = time.monotonic()
        self._seen = [_Seen(0, 0, "starting", now, now) for _ in range(self.world)]
        threading.Thread(target=self._exchange, name="signs of life", daemon=True).start()
        if self.timeout is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        if self._thread is None:
            self._close()
            if error is None and self.world > 1:
                dist.barrier()  # rank 0 keeps the store until then
            return
        if error is not None and _is_lost_connection(error):
            self._suspicious.set()
            self._thread.join()  # it finds out who it was, and ends the process; or nobody is missing
        if error is None:
            dist.barrier()  # rank 0 keeps the store until nobody needs it
        self._close()  # before the farewell: this rank would read it as a verdict, and end before its traceback
        if error is not None:
            self._say_farewell(error)
        self._thread.join()

    def _close(self) -> None:
        self._closed.set()
        self._hurry.set()

    def _exchange(self) -> None:
        """Write and read signs: in a thread of its own, as a store whose server is stopped never answers."""
        number = 0
        while not self._closed.is_set():
            self._hurry.wait(self._interval)
            self._hurry.clear()
            if self._closed.is_set():
                return
            number += 1
            try:
                self._put(number)
                self._read()
            except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
                self._reachable = False
                return
            self._exchanged = time.monotonic()

    def _watch(self) -> None:
        suspicious_since = None
        while not self._closed.wait(min(_LOOK_S, self._interval)):
            verdict = self._verdict or self._guards_verdict()
            if verdict is None and self._suspicious.is_set():
                suspicious_since = suspicious_since or time.monotonic()
                verdict = self._missing(_MISSED * self._interval)
                if verdict is None and time.monotonic() > suspicious_since + 3 * _MISSED * self._interval:
                    return  # everybody is there: the error is to be told as it is
            verdict = verdict or self._missing(self.timeout) or self._stuck()
            if verdict is not None and not self._closed.is_set():
                self._finish(verdict)
                return

    def _guards_verdict(self) -> str | None:
        """What this host's guard says of a rank that failed, or better what that rank itself has left to say."""
        failed = self._stop.failed.first()
        if not failed:
            return None
        if failed.startswith("rank 0 "):
            self._reachable = False  # it served the store
            return failed
        self._hurry.set()
        end = time.monotonic() + _LAST_WORDS_S
        while self._verdict is None and self._reachable and time.monotonic() < end:
            if self._closed.wait(0.05):  # all ranks have come to their end: it left because the run is over
                return None
        return self._verdict or failed

    def _put(self, number: int) -> None:
        step, operation, before = self._now
        sign = [number, before, f"step {step}, {operation}", self._stop.signalled]
        self._store.set(f"rank/{self.rank}", json.dumps(sign))

    def _read(self) -> None:
        """Note all signs, and the verdict that somebody else has reached."""
        now = time.monotonic()
        signs = self._store.multi_get([f"rank/{rank}" for rank in range(self.world)])
        for one, data in zip(self._seen, signs):
            sign, progress, told, signalled = json.loads(data)
            self._stop.hear(signalled)
            if sign != one.sign:
                one.sign, one.sign_since = sign, now
            if progress != one.progress:
                one.progress, one.progress_since = progress, now
            one.told = told
        if self._store.check([_VERDICT]):
            self._verdict = self._store.get(_VERDICT).decode()

    def _missing(self, seconds: float) -> str | None:
        now, seen = time.monotonic(), self._seen
        if now - self._exchanged > seconds:  # nobody else serves the store
            return f"rank 0 gives no sign of life for {now - self._exchanged:.0f} s (last: {seen[0].told})"
        gone = [rank for rank, one in enumerate(seen) if now - one.sign_since > seconds]
        if not gone:
            return None
        first = min(gone, key=lambda rank: seen[rank].sign_since)
        more = f", and so do ranks {', '.join(map(str, sorted(set(gone) - {first})))}" if len(gone) > 1 else ""
        since = now - seen[first].sign_since
        return f"rank {first} gives no sign of life for {since:.0f} s (last: {seen[first].told}){more}"

    def _stuck(self) -> str | None:
        """Whether nobody has made progress for too long: then the one that is furthest behind is waited for."""
        now, seen = time.monotonic(), self._seen
        oldest = min([self._exchanged, *(one.sign_since for one in seen)])
        if now - oldest > _MISSED * self._interval:
            return None  # somebody may be gone, which `_missing` will tell
        if any(now - one.progress_since <= self.timeout for one in seen):
            return None
        behind = min(range(self.world), key=lambda rank: seen[rank].progress)
        fix = f"if that was work and no hang, raise train.timeout_seconds={self.timeout:g}"
        if all(one.progress == seen[behind].progress for one in seen):
            return f"no rank has made progress for {self.timeout:g} s (all at {seen[behind].told}); {fix}"
        what = f"rank {behind} has made no progress for {self.timeout:g} s (at {seen[behind].told})"
        return f"{what}; the others wait for it; {fix}"

    def _finish(self, verdict: str) -> None:
        """Leave stacks, tell the others, and end this process."""
        path = self._folder / f"rank_{self.rank:05d}.txt"
        stacks = f"its stacks are in {path}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{verdict}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            stacks = f"its stacks could not be written to {path} ({error.strerror})"
        Console("err").say(f"error: {verdict}; rank {self.rank} ends too, {stacks}")
        self._tell(verdict)
        self._end(1)

    def _tell(self, verdict: str) -> None:
        """Let the others read a verdict, unless there is one or nothing to read it from."""
        if self.world == 1:
            return
        if not self._reachable or time.monotonic() - self._exchanged > _MISSED * self._interval:
            return
        try:
            if not self._store.check([_VERDICT]):
                self._store.set(_VERDICT, verdict)
            if self.rank == 0 and not self._one_host():
                time.sleep(2 * self._interval)  # the others read it here
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
            self._reachable = False

    def _one_host(self) -> bool:
        """Whether all ranks have the same guard, and read from it what this one has."""
        local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # torchrun's and DeepSpeed's names
        return bool(self._stop.failed.first()) and local == str(self.world)

    def _say_farewell(self, error: BaseException) -> None:
        """Leave the reason for the others, who will only see a lost connection."""
        if getattr(error, "on_every_rank", False) or isinstance(
            error, (FloatingPointError, Failure, KeyboardInterrupt)
        ):
            return  # they find the same
        step, operation, _ = self._now
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._tell(f"rank {self.rank} failed in step {step}, {operation} ({what})")


def _open_store(rank: int, timeout: float) -> dist.TCPStore:
    """A store of the watchdog's own: rank 0 serves, on any free port."""
    wait = datetime.timedelta(seconds=max(1.0, timeout))
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port: list = [None]
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    return store if rank == 0 else dist.TCPStore(host, port[0], is_master=False, timeout=wait)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    words = ("connection closed", "connection reset", "broken pipe", "timed out waiting", "connect")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
