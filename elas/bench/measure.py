"""How the benchmarks measure: time in turns, bytes saved for the backward pass, peak memory.

- **Time.** Variants take turns, one call of each per round, in an order that rotates between rounds, so that a
  temporary slowdown of the machine affects all of them. Medians over rounds; the first rounds are not counted.
- **Time on a GPU** (`gpu_seconds`). CUDA events around the call, behind an empty L2 cache and a wait that lets the host
  submit all of it first: what the GPU needs, without what Python needs. `host` is what Python needs.
- **Saved bytes.** Tensors that autograd saves, from `saved_tensors_hooks`: every storage once, even if several tensors
  view it, without storages that exist anyway (parameters, the input).
- **Peak memory.** The peak of allocated minus freed bytes, above the state before: from the allocator's events (torch's
  profiler) on a CPU, from its counters on CUDA. It does not include work space that MKL or oneDNN allocate themselves,
  nor buffers that a kernel keeps between calls.
"""

import contextlib
import functools
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_torch_c: Any = torch._C  # the profiler's part of it has no types

WAIT_CYCLES = 6_000_000
"""Of the GPU's clock, about 3.5 ms: longer than the host takes to submit what is timed."""
SILENCE_S = 10.0
"""Without a terminal, a benchmark prints what it does every so many seconds."""
_PROFILER_CHATTER = re.compile(r"CPUAllocator\.cpp|SyncActivityProfilerHandler|^(USDT|STAGE|INFO):")


def seconds(function: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Wall time of a call, and its result; on CUDA from an idle device until it is idle again."""
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return time.perf_counter() - start, result


def gpu_seconds(function: Callable[[], Result], device: torch.device) -> tuple[float, float, Result]:
    """The GPU's and the host's time of a call, and its result; on a CPU both are `seconds`."""
    if device.type != "cuda":
        taken, result = seconds(function, device)
        return taken, taken, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler(device).zero_()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    before = time.perf_counter()
    result = function()
    host = time.perf_counter() - before
    end.record()
    _synchronise(device)
    return 1e-3 * start.elapsed_time(end), host, result


@functools.lru_cache(maxsize=8)
def _cache_filler(device: torch.device) -> torch.Tensor:
    """Bytes that, written, leave nothing else in the L2 cache; at most 60 MB on chips of today."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    jobs: dict[str, Callable[[], tuple[float, ...]]],
    *,
    repeats: int,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[float, ...]]:
    """Medians of each job's times.

    Args:
        jobs: functions that do the work once and return its times.
        repeats: counted rounds.
        warmup: rounds before the counted ones.
        progress: called with the name of the job that starts.

    Returns:
        For each job, the median of each of its times.
    """
    names = list(jobs)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            progress(f"{name}, round {turn + 1} of {warmup + repeats}")
            result = jobs[name]()
            if turn >= warmup:
                times[name].append(result)
    return {name: tuple(statistics.median(column) for column in zip(*rows)) for name, rows in times.items()}


class SavedBytes:
    """Bytes that autograd saves inside its contexts, each storage once.

    Args:
        exclude: tensors whose storages do not count: parameters, and inputs that exist anyway.

    Attributes:
        storages: saved storages by address; the references prevent reuse of an address while counting.
    """

    def __init__(self, exclude: Iterable[torch.Tensor]):
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self.storages.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._excluded:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which saved tensors count."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @contextlib.contextmanager
    def inside(self, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """A context in which tensors saved during the forward of these modules count; they must not be nested."""
        entered: list[torch.autograd.graph.saved_tensors_hooks] = []

        def enter(*_unused) -> None:
            entered.append(self.hooks())
            entered[-1].__enter__()

        def leave(*_unused) -> None:
            entered.pop().__exit__(None, None, None)

        handles = []
        for module in modules:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Memory:
    """Memory allocated inside the context.

    Attributes:
        peak: peak of the bytes allocated inside and not yet freed.
        kept: bytes not freed at the end.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak, self.kept = device, 0, 0

    def __enter__(self) -> "Memory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_without_profiler_chatter())
        self._profiler = torch.autograd.profiler.profile(profile_memory=True)
        self._stack.enter_context(self._profiler)
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            self.kept = torch.cuda.memory_allocated(self.device) - self._before
            return
        self._stack.__exit__(*error)
        if error[0] is not None:
            return
        results = self._profiler.kineto_results
        assert results is not None, "the profiler has stopped"
        self._events = list(results.experimental_event_tree())
        inside: dict[int, int] = {}  # the profiler also reports frees of earlier sessions' addresses
        for event in sorted(self._allocations(), key=lambda e: e.start_time_ns):
            address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            if size > 0:
                inside[address] = size
                self.kept += size
            else:
                self.kept -= inside.pop(address, 0)
            self.peak = max(self.peak, self.kept)

    def events(self) -> list[Any]:
        """The profiler's tree of events, after the context; on a CPU only."""
        return self._events

    def _allocations(self) -> Iterator:
        tags = _torch_c._profiler._EventType
        pending = list(self._events)
        while pending:
            event = pending.pop()
            pending += event.children
            if event.tag == tags.Allocation:
                yield event


@contextlib.contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Suppress the profiler's lines on stderr; other output to stderr is written at the end."""
    with tempfile.TemporaryFile() as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            text = caught.read().decode(errors="replace")
            kept = [line for line in text.splitlines(keepends=True) if not _PROFILER_CHATTER.search(line)]
            os.write(2, "".join(kept).encode())


def rms_error(got: torch.Tensor | None, want: torch.Tensor) -> float:
    """Root mean square of the error relative to that of `want`, in fp64; infinite for NaN, None or another shape."""
    if got is None or got.shape != want.shape:
        return float("inf")
    want = want.double()
    ratio = float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
    return ratio if ratio == ratio else float("inf")
