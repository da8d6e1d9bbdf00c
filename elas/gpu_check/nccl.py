"""The part `NCCL`: an all-reduce of one rank, and of a rank on every GPU, against known sums."""

import multiprocessing
import queue
import statistics
import time
from datetime import timedelta
from pathlib import Path

from elas.bench import measure
from elas.gpu_check.rows import NO_TIME, Row
from elas.gpu_check.setting import Setting

SIZES = (1, 1000, 1 << 24)
"""Elements of fp32."""
REPEATS = 5
NO_RESULT = "no result"
ONE_GPU = "1 GPU; NCCL takes one rank for each"


def run(setting: Setting) -> None:
    """Write the rows of this part."""
    import torch

    count = torch.cuda.device_count()
    setting.add(_row(setting, "all-reduce of one rank", 1))
    group = "all-reduce over all GPUs"
    alone = Row(part="NCCL", group=group, result="not run", reason=ONE_GPU)
    setting.add(alone if count == 1 else _row(setting, group, count))


def _row(setting: Setting, group: str, ranks: int) -> Row:
    print(f"{group}: {ranks} ranks", flush=True)
    wrong, speed = all_reduce(ranks, "nccl", setting.work / f"store-{ranks}", max(5.0, setting.left_s - 5))
    if setting.tight and wrong.startswith(NO_RESULT):
        return Row(part="NCCL", group=group, result="not run", reason=NO_TIME)
    reason = wrong or f"sums of {ranks} ranks are exact"
    return Row(part="NCCL", group=group, result="wrong" if wrong else "right", reason=reason, speed=speed)


def all_reduce(ranks: int, backend: str, store: Path, seconds: float) -> tuple[str, dict[str, float] | None]:
    """Sum tensors over ranks, each a process with its own GPU, or on the CPU with gloo.

    Args:
        ranks: number of processes.
        backend: `nccl` or `gloo`.
        store: file through which they meet; must not exist.
        seconds: time limit.

    Returns:
        What was wrong, or empty; and `bus_gb_per_s` of the largest size as NCCL's tests define it, None for one rank.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [
        context.Process(target=_rank, args=(rank, ranks, backend, str(store), seconds, answers), daemon=True)
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    until, times, wrong = time.monotonic() + seconds, [], ""
    while len(times) < ranks and not wrong:
        try:
            rank, error, took = answers.get(timeout=0.5)
            times.append(took)
            wrong = error and f"rank {rank}: {error}"
        except queue.Empty:
            dead = [rank for rank, worker in enumerate(workers) if worker.exitcode]
            if dead:
                wrong = f"rank {dead[0]} ended with status {workers[dead[0]].exitcode}; nccl.log says more"
            elif time.monotonic() > until:
                wrong = f"{NO_RESULT} within {seconds:.0f} s, killed"
    for worker in workers:
        worker.join(0 if wrong else 10)
        worker.kill()
    if wrong or ranks == 1:
        return wrong, None
    sent = 2 * (ranks - 1) / ranks * 4 * SIZES[-1]
    return "", {"bus_gb_per_s": sent / max(times) / 1e9}


def _rank(rank: int, ranks: int, backend: str, store: str, seconds: float, answers) -> None:
    """One rank: sums of `rank + 1 + i % 7`, exact in fp32, and the median time of the largest."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    error, took = "", []
    for size in SIZES:
        places = torch.arange(size, device=device) % 7
        want = (ranks * (ranks + 1) // 2 + ranks * places).float()
        for _ in range(REPEATS if size == SIZES[-1] else 1):
            got = (places + rank + 1).float()
            dist.barrier()
            seconds_of, _ = measure.seconds(lambda got=got: dist.all_reduce(got), device)
            took.append(seconds_of)
            if not torch.equal(got, want):
                error = f"wrong sums of {size:,} elements: {int((got != want).sum()):,} differ"
    answers.put((rank, error, statistics.median(took[-REPEATS:])))
    dist.barrier()
    dist.destroy_process_group()
