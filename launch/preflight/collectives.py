"""Checks and times collectives over the ranks of a run; `elas launch check` starts this on every host.

    python -m elas.launch.preflight.collectives --hosts '{"n1": 2, "n2": 2}' --host n1 --master-addr A --master-port P

starts this host's ranks, which join the process group as in training: same variables, same choice of the interface,
same backend. Values are checked before anything is timed. Imports torch, but neither DeepSpeed nor Megatron-core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta

from elas.command import exit_status
from elas.errors import Failure
from elas.launch.guard.leash import end_with_launcher
from elas.launch.hostfile import ranks_by_host
from elas.launch.preflight.probe import say
from elas.launch.rank_environment import choose_interface, rank_and_world

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
"""Tensor sizes in bytes."""
MEET_S = 60.0
_BUDGET_S, _LEAST, _MOST = 1.0, 3, 20  # per operation and size: seconds to spend, least and most timed calls


def start_ranks(hosts: dict[str, int], host: str, address: str, port: int) -> int:
    """Start the ranks of one host and wait for them; the first failure kills the others.

    Args:
        hosts: number of ranks by host.
        host: this host.
        address: rendezvous address.
        port: rendezvous port.

    Returns:
        The exit status of the first rank that failed; 0 if none did.
    """
    ranks = ranks_by_host(hosts)[host]
    common = {
        "WORLD_SIZE": str(sum(hosts.values())),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "ELAS_HOST": host,
    }
    command = [sys.executable, "-m", "elas.launch.preflight.collectives"]
    started = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(local)})
        for local, rank in enumerate(ranks)
    ]
    while any(process.poll() is None for process in started):
        failed = next((process.returncode for process in started if process.poll()), 0)
        if failed:
            for process in started:
                process.kill()
                process.wait()
            return failed if failed > 0 else 128 - failed
        time.sleep(0.05)
    return max(process.returncode for process in started)


def run_rank(_: list[str]) -> int:
    """Run one rank; rank 0 prints the measurements. Returns 0.

    Raises:
        ConfigError: the rank's variables are invalid: see `elas.launch.rank_environment`.
        Failure: the ranks did not connect, or a collective gave wrong values.
    """
    end_with_launcher()
    rank, world = rank_and_world()
    interface = choose_interface()
    import torch
    import torch.distributed as dist

    from elas import accelerator

    if accelerator.has_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(accelerator.backend(), timeout=timedelta(seconds=MEET_S))
        rows = [
            row
            for size in SIZES
            for row in (
                _all_reduce(size, rank, world, accelerator.device()),
                _broadcast(size, rank, world, accelerator.device()),
            )
        ]
        dist.barrier()
    except RuntimeError as error:  # the base class of torch.distributed's errors
        if isinstance(error, Failure):
            raise
        raise Failure(f"rank {rank}: {error}"[:400]) from error
    if rank == 0:
        say(os.environ["ELAS_HOST"], {
            "backend": accelerator.backend(), "world": world, "interface": interface, "rows": rows,
            "latency_s": rows[0]["median_s"], "gb_per_s": rows[-2]["gb_per_s"],
        })  # fmt: skip
    return 0


def _pattern(size: int, device):
    """A float32 vector of `size` bytes, of small whole numbers, so that sums are exact in any order."""
    import torch

    return (torch.arange(size // 4, device=device) % 97).float()


def _all_reduce(size: int, rank: int, world: int, device) -> dict:
    import torch
    import torch.distributed as dist

    vector = _pattern(size, device) * (rank + 1)
    dist.all_reduce(vector)
    if not torch.equal(vector, _pattern(size, device) * (world * (world + 1) // 2)):
        raise Failure(f"rank {rank}: all_reduce of {size} bytes gave wrong values")
    return _row("all_reduce", size, vector.zero_(), lambda: dist.all_reduce(vector))


def _broadcast(size: int, rank: int, world: int, device) -> dict:
    """Broadcast from the last rank."""
    import torch
    import torch.distributed as dist

    vector = _pattern(size, device) * (rank + 1)
    dist.broadcast(vector, world - 1)
    if not torch.equal(vector, _pattern(size, device) * world):
        raise Failure(f"rank {rank}: broadcast of {size} bytes gave wrong values")
    return _row("broadcast", size, vector, lambda: dist.broadcast(vector, world - 1))


def _row(name: str, size: int, vector, operation) -> dict:
    """Time an operation: the median over several calls, on the slowest rank."""
    number = max(_LEAST, min(_MOST, int(_BUDGET_S / _longest(_timed(vector, operation), vector.device))))
    times = [_timed(vector, operation) for _ in range(number)]
    median = _longest(statistics.median(times), vector.device)
    return {"operation": name, "bytes": size, "median_s": median, "gb_per_s": size / median / 1e9, "calls": number}


def _timed(vector, operation) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    operation()
    if vector.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _longest(seconds: float, device) -> float:
    import torch
    import torch.distributed as dist

    longest = torch.tensor(seconds, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def main(argv: list[str]) -> int:
    """Start this host's ranks; returns their exit status."""
    parser = argparse.ArgumentParser(prog="python -m elas.launch.preflight.collectives")
    parser.add_argument("--hosts", type=json.loads, required=True, help="ranks by host, JSON")
    parser.add_argument("--host", default=os.environ.get("SLURMD_NODENAME"), help="this host")
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    options = parser.parse_args(argv)
    return start_ranks(options.hosts, options.host, options.master_addr, options.master_port)


if __name__ == "__main__":
    status = exit_status(main if sys.argv[1:] else run_rank, sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads sometimes abort in C++'s static destructors: see elas.command.end_process
