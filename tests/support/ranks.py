"""Gloo ranks for tests: one pool of processes per world size, started once and shared by every test of a session.

Processes are kept and jobs are sent to them (what a job imports stays imported for the next one):

    losses = run_ranks(2, job, {"parallel.tensor": 2})    # job runs on both ranks; one result a rank comes back

A job is a module-level function of an importable module. It finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT set and the default process group there; `elas.parallel.initialize` adds Megatron's groups. After each job
everything is taken down (Megatron's groups, DeepSpeed's, the default one), so the next may have another layout.

What can go wrong, and what happens: a job that outlasts its time kills the pool and raises with every rank's stack and
output; a rank that raises or dies is reported with its traceback, and ranks left waiting for it are killed, not waited
for. The next job gets a fresh pool. A pool dies with the process that made it.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from support.device import needs_gpus
from support.forked import HANDLE, Forked

START_TIMEOUT_S = 180.0
GRACE_S = 3.0  # after one rank failed: how long the others may take to answer before they count as stuck
TAIL_LINES = 60  # of a rank's output in a report


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback or stack, and its last output."""


class AllRaised(RankError):
    """Every rank raised."""


def run_ranks(world_size: int, function: Callable | str, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list:
    """Run `function(*args, **kwargs)` on every rank of a pool.

    Args:
        world_size: ranks.
        function: a module-level function, or `"module:name"`.
        args: picklable, the same on each rank.
        timeout: seconds for the whole job with what it imports, not counting the start of a pool.
        kwargs: like args.

    Returns:
        One result a rank, in order of rank.

    Raises:
        RankError: with the traceback of the rank that failed first, or every rank's stack after a time-out.
    """
    needs_gpus(world_size)
    target = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    job = pickle.dumps((target, sys.path, pickle.dumps((args, kwargs))))
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = RankPool(world_size)
    try:
        return pool.run(job, timeout)
    finally:
        if not pool.healthy:
            pool.close()
            _pools.pop(world_size, None)


@atexit.register
def close_all() -> None:
    """End every pool."""
    while _pools:
        _pools.popitem()[1].close()


_pools: dict[int, "RankPool"] = {}


class RankPool:
    """The processes of one world size.

    Attributes:
        pids: their process ids.
        healthy: whether the next job may be sent here.
    """

    def __init__(self, world_size: int):
        from elas.config import Config
        from elas.engine.prebuild import prebuild

        prebuild(Config())  # here, lest it count against a job's time
        self.healthy = False
        self._jobs = 0
        self._folder = Path(tempfile.mkdtemp(prefix="elas-ranks-"))
        self._logs = [self._folder / f"rank{rank}.log" for rank in range(world_size)]
        self._connections: list[Connection] = []
        self._processes: list[Forked] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, log in enumerate(self._logs):
            ours, theirs = Pipe()
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
            log.touch()
            with theirs:
                process = Forked([__file__, str(self._folder)], env, log, theirs.fileno())
            self._connections.append(ours)
            self._processes.append(process)
        self._offsets = [0] * world_size
        try:
            self._collect(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.healthy = True

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def run(self, job: bytes, timeout: float) -> list:
        """Send a pickled job, and wait for every rank's result; see `run_ranks`."""
        self.healthy = False
        self._jobs += 1
        self._offsets = [log.stat().st_size for log in self._logs]
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a rank that died between jobs: _collect says so
                connection.send_bytes(pickle.dumps((self._jobs, job)))
        try:
            results = self._collect(timeout)
        except AllRaised:  # nobody was left waiting for anybody
            self.healthy = True
            raise
        self.healthy = True
        return results

    def _collect(self, timeout: float) -> list:
        """Every rank's result; raises if there is one without."""
        answers: dict[int, tuple[str, Any]] = {}
        deadline, failed = time.monotonic() + timeout, []
        while len(answers) < len(self._connections):
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in map(self._connections.index, ready):
                answers[rank] = self._receive(rank)
                if answers[rank][0] != "ok":
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        kinds = [answers[rank][0] if rank in answers else "waiting" for rank in range(len(self._connections))]
        if "waiting" in kinds and not failed:
            raise RankError(self._timeout_report(timeout, [r for r, kind in enumerate(kinds) if kind == "waiting"]))
        if failed and set(kinds) != {"raised"}:
            # When a rank dies, the others may be first to say so, by an error about a lost connection.
            culprit = kinds.index("died") if "died" in kinds else failed[0]
            raise RankError(f"rank {culprit} of {len(kinds)} failed (ranks: {kinds})\n{answers[culprit][1]}")
        if failed:
            raise AllRaised(f"rank {failed[0]} of {len(kinds)} failed first (ranks: {kinds})\n{answers[failed[0]][1]}")
        return [answers[rank][1] for rank in range(len(kinds))]

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except EOFError:
            status = self._processes[rank].wait(10)
            return "died", f"the process ended with status {status}\n{self._output(rank)}"

    def _timeout_report(self, timeout: float, missing: list[int]) -> str:
        for rank in missing:
            with contextlib.suppress(ProcessLookupError):
                self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        reports = "\n".join(f"--- rank {rank}\n{self._output(rank)}" for rank in missing)
        return f"no answer within {timeout:.0f} s from ranks {missing} of {len(self._logs)}\n{reports}"

    def _output(self, rank: int) -> str:
        with self._logs[rank].open("rb") as log:
            log.seek(self._offsets[rank])
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])

    def close(self) -> None:
        """Kill the processes, by their ids, and remove their files."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(connection: Connection, folder: str) -> None:
    """A rank's life: import what is slow, then jobs until the other end of the pipe goes away."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    jobs: queue.Queue[bytes] = queue.Queue()

    def receive() -> None:  # in a thread, so that a rank stuck in a collective still dies with its parent
        while True:
            try:
                jobs.put(connection.recv_bytes())
            except (EOFError, OSError):
                shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed could not
                os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    connection.send_bytes(pickle.dumps(_attempt(importlib.import_module, "torch.distributed", give=False)))
    while True:
        number, job = pickle.loads(jobs.get())
        answer = _attempt(_run_job, job, f"file://{folder}/store{number}")
        if answer[0] != "ok":  # said at once: taking down makes others raise too, about lost connections
            connection.send_bytes(pickle.dumps(answer))
            _take_down()
            continue
        taken_down = _attempt(_take_down)
        connection.send_bytes(pickle.dumps(answer if taken_down[0] == "ok" else taken_down))


def _attempt(function: Callable, *args: Any, give: bool = True) -> tuple[str, Any]:
    try:
        result = function(*args)
        if not give:
            return "ok", None
        pickle.dumps(result)
        return "ok", result
    except BaseException:
        return "raised", traceback.format_exc()


def _run_job(job: bytes, store: str) -> Any:
    import torch.distributed as dist

    target, path, arguments = pickle.loads(job)
    sys.path[:] = path
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():  # the first job
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    args, kwargs = pickle.loads(arguments)
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _take_down() -> None:
    """Leave nothing of a job but process groups: Megatron's globals, DeepSpeed's caches and backend, the RNG.

    Groups stay: `elas.accelerator.shared_gloo_groups` hands the next job those it has. A gloo group that is destroyed
    and made anew for each job leaves polling threads behind, 1,500 of them after fifty layouts, which starve two cores.
    """
    import torch

    gc.collect()  # engines hold hooks and buffers in cycles
    if "elas.parallel" in sys.modules:
        sys.modules["elas.parallel"].shut_down()
    if "deepspeed" in sys.modules:
        import deepspeed
        from deepspeed.utils import groups

        groups._release_process_group_references(group=None)
        deepspeed.comm.comm.cdb = None
    torch.manual_seed(0)


if __name__ == "__main__":
    _serve(Connection(HANDLE), sys.argv[1])
