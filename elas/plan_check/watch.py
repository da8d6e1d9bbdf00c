"""Watches training steps on a rank: bytes that collectives send, FLOPs, and where the time goes.

Nothing of the engine is replaced by something that computes otherwise: operators are seen by torch's dispatch modes,
and waiting for other ranks by the clock around `Work.wait`, through which gloo's collectives and messages all pass. On
a GPU nothing waits there, so there the parts of the time are not measured.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from elas import parallel
from elas.engine.engine import Engine

SHARES = {
    "allreduce_": 2, "broadcast_": 1, "_allgather_base_": 1, "allgather_": 1, "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1,
}  # fmt: skip
"""By torch's name of a collective: passes over a ring of which each sends all parts but a rank's own."""
_c10d: Any = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]


class CountTraffic(TorchDispatchMode):
    """Counts bytes that this rank sends while it is active, collectives as rings.

    Attributes:
        sent: bytes by `tensor`, `pipeline`, `data`, and in all-to-alls `matrices`. A few numbers that all ranks
            exchange count with the group that has the same ranks, else with `pipeline`.

    Raises:
        RuntimeError: a collective of an unknown kind, so that none is missed.
    """

    def __init__(self):
        super().__init__()
        self.sent = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0, "matrices": 0.0}
        groups = {"data": parallel.data_group(), "tensor": parallel.tensor_group()}
        ranks = {kind: tuple(dist.get_process_group_ranks(group)) for kind, group in groups.items()}
        self._kinds: dict[tuple[int, ...], str] = {which: kind for kind, which in ranks.items() if len(which) > 1}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count a collective, then run the operator."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in ("recv_", "barrier"):
            return
        # The first script object is the process group; a reduction is one, too.
        group = dist.ProcessGroup.unbox(next(one for one in args if isinstance(one, torch.ScriptObject)))
        whole = _flat(args[1] if "reduce_scatter" in name else args[0])
        size = sum(tensor.nbytes for tensor in whole)
        if name == "send":
            self.sent["pipeline"] += size
        elif name == "alltoall_base_":
            given, splits = args[1], args[4]
            self.sent["matrices"] += given.nbytes - splits[group.rank()] * given.element_size()
        elif name in SHARES:
            kind = self._kinds.get(tuple(dist.get_process_group_ranks(group)), "pipeline")
            self.sent[kind] += SHARES[name] * (group.size() - 1) / group.size() * size
        else:
            raise RuntimeError(f"collective {name} is not counted")


def _flat(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [t for inner in tensors for t in _flat(inner)]


@contextlib.contextmanager
def count_flops(found: list[float]) -> Iterator[None]:
    """Within it torch counts FLOPs of products and of causal attention (the half not masked); appended at the end."""
    aten = torch.ops.aten

    def scores(of_backward: bool):
        def count(q, k, *_args, out_shape=None, **_kwargs):
            b, heads, s, width = k if of_backward else q  # a backward pass has the gradient first
            return (4 if of_backward else 2) * b * heads * s * s * width  # half of 2·s·s: causal

        return count

    added: dict[Any, Callable] = {aten.addmm_: lambda _c, a, b, out_shape=None, **_: mm_flop(a, b)}
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        for end, of_backward in (("", False), ("_backward", True)):
            operator = getattr(aten, f"_scaled_dot_product_{name}{end}", None)
            if operator is not None:
                added[operator] = scores(of_backward)
    with FlopCounterMode(display=False, custom_mapping=added) as mode:
        yield
    found.append(float(mode.get_total_flops()))


class Clock:
    """Seconds of steps on this rank by what it does; a context manager.

    Attributes:
        seconds: `collectives` and `messages`, waited for; `update`, without waiting.
    """

    def __init__(self, engine: Engine):
        self._engine: Any = engine
        self._messages: set[int] = set()
        self._undo: list[Callable[[], None]] = []
        self.reset()

    def reset(self) -> None:
        """Start again at 0."""
        self.seconds = {"collectives": 0.0, "messages": 0.0, "update": 0.0}

    def __enter__(self) -> "Clock":
        self._replace(_c10d.Work, "wait", self._timed_wait)
        for name in ("send", "recv"):
            self._replace(_c10d.ProcessGroup, name, self._noted_message)
        owner, name = (self._engine, "_update") if self._engine.uses_schedule else (self._engine.deepspeed, "step")
        self._replace(owner, name, self._timed_update)
        return self

    def __exit__(self, *_error) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, wrapped: Callable[[Callable], Callable]) -> None:
        own = vars(owner).get(name)  # of a C++ class not what `getattr` gives, which would not bind to instances
        setattr(owner, name, wrapped(getattr(owner, name)))
        self._undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))

    def _timed_wait(self, wait: Callable) -> Callable:
        def timed(work, *args, **kwargs):
            begun = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                kind = "messages" if id(work) in self._messages else "collectives"
                self._messages.discard(id(work))
                self.seconds[kind] += time.perf_counter() - begun

        return timed

    def _noted_message(self, start: Callable) -> Callable:
        def noted(*args, **kwargs):
            work = start(*args, **kwargs)
            self._messages.add(id(work))
            return work

        return noted

    def _timed_update(self, update: Callable) -> Callable:
        def timed(*args, **kwargs):
            begun, before = time.perf_counter(), self._waited
            try:
                return update(*args, **kwargs)
            finally:
                self.seconds["update"] += time.perf_counter() - begun - (self._waited - before)

        return timed

    @property
    def _waited(self) -> float:
        return self.seconds["collectives"] + self.seconds["messages"]


class _Done:
    """A request that is complete."""

    def wait(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def copied_collectives() -> Iterator[None]:
    """Collectives of tensor parallelism as copies, with the right shapes and wrong values.

    gloo's threads free what they have sent, which the profiler of this thread does not see.
    """
    from megatron.core.tensor_parallel import mappings

    def gather(out, x, group=None, **_):
        out.view(-1, *x.shape).copy_(x)

    def scatter(out, x, group=None, **_):
        out.copy_(x[: len(out)])

    names = {"dist_all_gather_func": gather, "dist_reduce_scatter_func": scatter}
    before = {name: getattr(mappings, name) for name in names}
    all_reduce = dist.all_reduce
    try:
        for name, copy in names.items():
            setattr(mappings, name, copy)
        dist.all_reduce = lambda *_args, **_kwargs: _Done()  # for those that ask for a request
        yield
    finally:
        for name, function in before.items():
            setattr(mappings, name, function)
        dist.all_reduce = all_reduce
