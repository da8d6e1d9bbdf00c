"""On a rank: bytes/s and latency of each kind of collective between all ranks of this machine."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from elas import accelerator
from elas.bench import measure
from elas.plan.traffic import SHARES

SMALL = 2**4
"""fp32 values of a message that only has a latency."""
LARGE = {"cpu": 2**19, "cuda": 2**24}
"""fp32 values of a message whose bytes count: what a micro-batch of some thousand tokens sends."""
TURN_S, LEAST_CALLS = 0.25, 9


def links(world: int) -> dict[str, dict[str, float]]:
    """By kind: `bytes_per_s` of a ring, and `latency_s`; empty on one rank."""
    if world == 1:
        return {}
    found = {}
    values = LARGE[accelerator.device().type] // world * world
    for kind, call in _calls(world).items():
        latency, whole = _seconds(call(SMALL * world)), _seconds(call(values))
        sent = values * 4 * (SHARES[kind] * (world - 1) / world if kind in SHARES else 1)
        moving = max(whole - latency, whole / 2)  # on a busy machine a small message may take as long as a large one
        found[kind] = {"bytes_per_s": sent / moving, "latency_s": min(latency, whole)}
    return found


def _calls(world: int) -> dict[str, Callable[[int], Callable[[], object]]]:
    def tensor(values: int) -> torch.Tensor:
        return torch.ones(values, device=accelerator.device())

    def reduce(values: int):
        whole = tensor(values)
        return lambda: dist.all_reduce(whole)

    def gather(values: int):
        whole, part = tensor(values), tensor(values // world)
        return lambda: dist.all_gather_into_tensor(whole, part)

    def scatter(values: int):
        whole, part = tensor(values), tensor(values // world)
        return lambda: dist.reduce_scatter_tensor(part, whole)

    def send(values: int):
        out, into, peer = tensor(values), tensor(values), dist.get_rank() ^ 1
        if peer >= world:
            return lambda: None

        def exchange() -> None:  # batched, as NCCL would wait for ever with each peer's sends before its receives
            both = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
            for request in dist.batch_isend_irecv(both):
                request.wait()

        return exchange

    return {"all_reduce": reduce, "all_gather": gather, "reduce_scatter": scatter, "send": send}


def _seconds(call: Callable[[], object]) -> float:
    """The median of calls, as many on every rank; the largest over ranks."""
    device = accelerator.device()
    call()
    dist.barrier()
    begun = time.perf_counter()
    call()
    calls = torch.tensor(min(500, max(LEAST_CALLS, int(TURN_S / (time.perf_counter() - begun + 1e-9)))), device=device)
    dist.all_reduce(calls, op=dist.ReduceOp.MIN)
    times = [measure.seconds(call, device)[0] for _ in range(int(calls))]
    median = torch.tensor(statistics.median(times), dtype=torch.float64, device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median)
