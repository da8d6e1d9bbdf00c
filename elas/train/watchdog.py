"""Ends a run when one of its ranks is gone or stuck, and reports which.

A thread in every rank writes heartbeats into a store on rank 0 and reads those of the other ranks. A process that was
killed or stopped sends none; one whose main thread is stuck sends heartbeats without progress. In both cases every rank
writes the stacks of its threads to `RUN_DIR/stacks`, reports the rank and its last operation, and ends with status 1;
there is no other way to release a rank that waits in a collective. Progress is a micro-batch, or the next one of a
run's other operations.

If a guard runs this host's ranks (`elas.launch.guard.guard`), it notices a failed rank at once and writes that into a
file, so that the ranks need not wait for missing heartbeats.

Heartbeats also carry the stop signals that a rank has received, so that the others learn of them during a step.
"""

import contextlib
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
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] public, but not in `__all__`

from elas.config import TrainConfig
from elas.console import Console
from elas.errors import Failure
from elas.train.incidents import Incidents
from elas.train.signals import StopRequest

_LONGEST_INTERVAL, _SHORTEST_INTERVAL = 5.0, 0.2  # seconds between heartbeats
_MISSED = 4
"""Consecutive missing heartbeats after which a rank counts as gone once a connection was lost."""
_VERDICT = "verdict"
_LOOK_S = 0.5
"""Seconds between two checks whether this host's guard has reported a failed rank."""
_LAST_WORDS_S = 2.0
"""Seconds to wait for the message that a rank leaves in the store when it fails by an exception."""


@dataclass
class _Seen:
    """State of a rank: its last heartbeat and progress, and since when (this host's clock) they have not changed."""

    beat: int
    progress: int
    label: str
    beat_since: float
    progress_since: float


class Watchdog:
    """Watches the ranks of a run; a context manager. Without a time-out it only exchanges heartbeats.

    Args:
        config: `timeout_seconds`, and the run's folder for the stacks.
        stop: is notified of the signals that other ranks received.
        end: ends the process; replaced in tests.
    """

    def __init__(self, config: TrainConfig, stop: StopRequest | None = None, end: Callable[[int], object] = os._exit):
        self._stop = stop or StopRequest(None)
        self.timeout = config.timeout_seconds
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._run_dir = config.run_dir
        self._end = end
        self._now = (0, "starting", 0)  # step, operation, number of operations before it
        self._reachable = True
        self._verdict: str | None = None
        self._closed = threading.Event()
        self._hurry = threading.Event()  # exchange heartbeats now
        self._suspicious = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, step: int, operation: str) -> None:
        """Record the operation that this rank is about to start."""
        self._now = (step, operation, self._now[2] + 1)

    def __enter__(self) -> "Watchdog":
        if self.timeout is None and self.world == 1:
            return self
        timeout = 10 * _LONGEST_INTERVAL if self.timeout is None else self.timeout
        self._interval = min(_LONGEST_INTERVAL, max(_SHORTEST_INTERVAL, timeout / 10))
        self._store = _open_store(self.rank, timeout)
        self._put(0)
        dist.barrier()  # every rank has written its first heartbeat
        now = self._exchanged = time.monotonic()
        self._seen = [_Seen(0, 0, "starting", now, now) for _ in range(self.world)]
        threading.Thread(target=self._exchange, name="heartbeats", daemon=True).start()
        if self.timeout is not None:
            self._thread = threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        if self._thread is None:
            self._close()
            if error is None and self.world > 1:
                dist.barrier()  # rank 0 serves the store until all ranks are done
            return
        if error is not None and _is_lost_connection(error):
            self._suspicious.set()
            self._thread.join()  # ends the process if a rank is missing; returns if all ranks are alive
        if error is None:
            dist.barrier()  # rank 0 serves the store until all ranks are done
        self._close()  # before the error is published, which this rank would read as a verdict and end on
        if error is not None:
            self._publish_error(error)
        self._thread.join()

    def _close(self) -> None:
        self._closed.set()
        self._hurry.set()

    def _exchange(self) -> None:
        """Write and read heartbeats; in a separate thread, as calls never return if the store's server is stopped."""
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

    def _watch(self, timeout: float) -> None:
        suspicious_since = None
        while not self._closed.wait(min(_LOOK_S, self._interval)):
            verdict = self._verdict or self._guards_verdict()
            if verdict is None and self._suspicious.is_set():
                suspicious_since = suspicious_since or time.monotonic()
                verdict = self._missing(_MISSED * self._interval)
                if verdict is None and time.monotonic() > suspicious_since + 3 * _MISSED * self._interval:
                    return  # all ranks are alive, so the original error is raised
            verdict = verdict or self._missing(timeout) or self._stuck(timeout)
            if verdict is not None and not self._closed.is_set():
                self._finish(verdict)
                return

    def _guards_verdict(self) -> str | None:
        """The failure that this host's guard reports; if that rank has published its own error, that one instead."""
        failed = self._stop.failed.first()
        if not failed:
            return None
        if failed.startswith("rank 0 "):
            self._reachable = False  # rank 0 served the store
            return failed
        self._hurry.set()
        end = time.monotonic() + _LAST_WORDS_S
        while self._verdict is None and self._reachable and time.monotonic() < end:
            if self._closed.wait(0.05):  # the run is over, and the rank ended with it
                return None
        return self._verdict or failed

    def _put(self, number: int) -> None:
        step, operation, before = self._now
        beat = [number, before, f"step {step}, {operation}", self._stop.signalled]
        self._store.set(f"rank/{self.rank}", json.dumps(beat))

    def _read(self) -> None:
        """Read all heartbeats, and the verdict if another rank has published one."""
        now = time.monotonic()
        beats = self._store.multi_get([f"rank/{rank}" for rank in range(self.world)])
        for one, data in zip(self._seen, beats):
            beat, progress, one.label, signalled = json.loads(data)
            self._stop.hear(signalled)
            if beat != one.beat:
                one.beat, one.beat_since = beat, now
            if progress != one.progress:
                one.progress, one.progress_since = progress, now
        if self._store.check([_VERDICT]):
            self._verdict = self._store.get(_VERDICT).decode()

    def _missing(self, seconds: float) -> str | None:
        """The verdict if a rank has sent no heartbeat for `seconds`; the one that is silent longest is named first."""
        now, seen = time.monotonic(), self._seen
        if now - self._exchanged > seconds:  # rank 0 serves the store
            return f"rank 0 has sent no heartbeat for {now - self._exchanged:.0f} s (last: {seen[0].label})"
        gone = [rank for rank, one in enumerate(seen) if now - one.beat_since > seconds]
        if not gone:
            return None
        first = min(gone, key=lambda rank: seen[rank].beat_since)
        others = ", ".join(map(str, sorted(set(gone) - {first})))
        more = f"; nor have ranks {others}" if others else ""
        since = now - seen[first].beat_since
        return f"rank {first} has sent no heartbeat for {since:.0f} s (last: {seen[first].label}){more}"

    def _stuck(self, timeout: float) -> str | None:
        """The verdict if no rank has made progress for too long; the others wait for the rank furthest behind."""
        now, seen = time.monotonic(), self._seen
        oldest = min([self._exchanged, *(one.beat_since for one in seen)])
        if now - oldest > _MISSED * self._interval:
            return None  # a rank may be gone, which `_missing` will report
        if any(now - one.progress_since <= timeout for one in seen):
            return None
        behind = min(range(self.world), key=lambda rank: seen[rank].progress)
        fix = f"if it was slow rather than stuck, raise train.timeout_seconds={timeout:g}"
        if all(one.progress == seen[behind].progress for one in seen):
            return f"no rank has made progress for {timeout:g} s (all at {seen[behind].label}); {fix}"
        what = f"rank {behind} has made no progress for {timeout:g} s (at {seen[behind].label})"
        return f"{what}; the others wait for it; {fix}"

    def _finish(self, verdict: str) -> None:
        """Write the stacks and the event, publish the verdict, and end this process."""
        path = Path(self._run_dir) / "stacks" / f"rank_{self.rank:05d}.txt"
        stacks = f"its stacks are in {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{verdict}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            stacks = f"its stacks could not be written to {path} ({error.strerror})"
        Console("err").last(f"error: {verdict}; rank {self.rank} ends too, {stacks}")
        with contextlib.suppress(OSError):  # such as a full disk
            Incidents(self._run_dir, writes=self.rank == 0).note("failed", self._now[0], why=verdict)
        self._publish(verdict)
        self._end(1)

    def _publish(self, verdict: str) -> None:
        """Write a verdict into the store, unless it holds one already or is unreachable."""
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
        """Whether all ranks run on this host, and so read the failure from the same guard."""
        local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # torchrun's and DeepSpeed's names
        return bool(self._stop.failed.first()) and local == str(self.world)

    def _publish_error(self, error: BaseException) -> None:
        """Publish this rank's error to the others, which otherwise only see a lost connection."""
        if getattr(error, "on_every_rank", False) or isinstance(
            error, (FloatingPointError, Failure, KeyboardInterrupt)
        ):
            return  # the other ranks raise the same
        step, operation, _ = self._now
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._publish(f"rank {self.rank} failed in step {step}, {operation} ({what})")


def _open_store(rank: int, timeout: float) -> TCPStore:
    """A separate store for the watchdog; rank 0 serves it on a free port."""
    wait = datetime.timedelta(seconds=max(1.0, timeout))
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port: list = [None]
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    return store if rank == 0 else TCPStore(host, port[0], is_master=False, timeout=wait)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    words = ("connection closed", "connection reset", "broken pipe", "timed out waiting", "connect")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
