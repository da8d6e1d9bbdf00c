"""What the memory of a training step is used for, from the allocator's events on a CPU.

Every allocation of a step is attributed to where it was made: in a layer's forward pass, in the embedding or the
final norm, in the rest of the model's forward pass (head and loss), in the update, or in the backward pass. Those that
outlive the model's forward pass are what the layer keeps for the backward pass; a layer's output counts for the layer
that made it. Gradients are recognised by their addresses when the update begins.

On CUDA the allocator has counters only: what layers keep and the peak, in blocks of 512 bytes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from elas.bench import measure

LAYER, END, MODEL, UPDATE = "elas::layer", "elas::end", "elas::model", "elas::update"


class Model(Protocol):
    """A model under measurement."""

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        """The transformer layers."""
        ...

    @property
    def ends(self) -> Sequence[torch.nn.Module]:
        """Embedding and final norm."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The whole model, whose forward pass includes the loss."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters."""
        ...

    def around_update(self, begin: Callable[[], None], end: Callable[[], None]) -> contextlib.AbstractContextManager:
        """Call these before and after each update of the optimizer."""
        ...


@dataclass
class Account:
    """Bytes that one step allocates."""

    layers: int
    """Kept by the layers for the backward pass: the sum over all layers."""
    peak: int
    """Largest sum of what the step has allocated and not yet freed."""
    above: int | None = None
    """The same without gradients of weights; None on CUDA."""
    gradients: int | None = None
    """Gradients of weights and their copies and buckets in the update, at their largest; None on CUDA."""
    head: int | None = None
    """Largest sum of what head and loss allocate in the forward pass, without gradients of weights; None on CUDA."""
    parts: dict[str, int] | None = None
    """The peak by component; None on CUDA. `layers`: kept by them; `ends`: embedding and final norm; `head`: with the
    loss; `gradients`: of weights; `update`: the optimizer's temporary tensors and buckets; `workspaces`: the rest,
    mostly temporary tensors of the layers' passes."""


@dataclass
class _Allocation:
    size: int
    time: int
    freed: float
    mark: str | None
    mark_end: float
    """When the marked part ended; of a layer, when the model's forward pass did."""
    address: int


def measure_step(step: Callable[[], object], model: Model, device: torch.device) -> Account:
    """Account for one call of `step`, which must have been called before.

    Args:
        step: one training step of `model`.
        model: see `Model`.
        device: of the model.
    """
    if device.type == "cuda":
        return _by_counters(step, model, device)
    gradients: set[int] = set()

    def update_begins() -> None:
        gradients.update(p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None)
        marks.begin(UPDATE)

    marks = _Marks()
    memory = measure.Memory(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        parts = [
            (model.module, MODEL),
            *((layer, LAYER) for layer in model.layers),
            *((end, END) for end in model.ends),
        ]
        for module, name in parts:
            stack.enter_context(marks.around(module, name))
        stack.enter_context(model.around_update(update_begins, lambda: marks.end(UPDATE)))
        step()
    made, update = _allocations(memory.events())
    return _account(made, gradients, update)


class _Marks:
    """Names parts of a step in the profiler's events."""

    def __init__(self):
        self._open: list[torch.profiler.record_function] = []

    def begin(self, name: str) -> None:
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def end(self, _name: str) -> None:
        self._open.pop().__exit__(None, None, None)

    @contextlib.contextmanager
    def around(self, module: torch.nn.Module, name: str) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(lambda *_: self.begin(name)),
            module.register_forward_hook(lambda *_: self.end(name)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _allocations(roots: Sequence[Any]) -> tuple[list[_Allocation], float]:
    """All allocations of a profile, in order, and when the update began."""
    tags: Any = torch._C._profiler._EventType  # pyright: ignore[reportAttributeAccessIssue]
    found: list[tuple[int, int, int, str | None, float]] = []
    update = math.inf
    pending = [(event, None, math.inf) for event in roots]
    while pending:
        event, mark, end = pending.pop()
        # A layer's forward pass that is computed again in the backward pass is not in the model's.
        if event.name in (MODEL, UPDATE) or (event.name in (LAYER, END) and mark == MODEL):
            # Of a layer the end of the model's pass: threads of gloo free what they sent a moment later.
            mark, end = event.name, end if event.name == LAYER else event.end_time_ns
            update = min(update, event.start_time_ns if mark == UPDATE else math.inf)
        if event.tag == tags.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size, mark, end))
        pending += [(child, mark, end) for child in event.children]
    live: dict[int, _Allocation] = {}
    made: list[_Allocation] = []
    for time, address, size, mark, end in sorted(found, key=lambda one: one[0]):
        if size > 0:
            live[address] = _Allocation(size, time, math.inf, mark, end, address)
            made.append(live[address])
        elif (one := live.pop(address, None)) is not None:
            one.freed = time
    return made, update


def _account(made: list[_Allocation], gradients: set[int], update: float) -> Account:
    """The account of these allocations.

    Args:
        made: all of a step.
        gradients: addresses of the weights' gradients at `update`.
        update: when the update began.
    """
    peak, at = _peak(made)

    def is_gradient(one: _Allocation) -> bool:
        return one.address in gradients and one.time < update <= one.freed

    above, _ = _peak([one for one in made if not is_gradient(one)])
    held, _ = _peak([one for one in made if is_gradient(one) or one.mark == UPDATE])
    head, _ = _peak([one for one in made if one.mark == MODEL and not is_gradient(one)])
    parts: dict[str, int] = dict.fromkeys(("layers", "ends", "head", "gradients", "update", "workspaces"), 0)
    layers = 0
    for one in made:
        kept = one.mark == LAYER and one.freed > one.mark_end
        layers += one.size if kept else 0
        if one.time <= at < one.freed:
            parts[_part(one, kept, is_gradient(one))] += one.size
    return Account(layers=layers, peak=peak, above=above, gradients=held, head=head, parts=parts)


def _peak(made: list[_Allocation]) -> tuple[int, float]:
    """Largest sum of the bytes that these hold at one time, and that time."""
    peak, at, total = 0, 0.0, 0
    changes = [(one.time, one.size) for one in made] + [(one.freed, -one.size) for one in made]
    for time, size in sorted(changes):  # at equal times frees come first
        total += size
        if total > peak:
            peak, at = total, time
    return peak, at


def _part(one: _Allocation, kept: bool, is_gradient: bool) -> str:
    if is_gradient or kept:
        return "gradients" if is_gradient else "layers"
    return {END: "ends", MODEL: "head", UPDATE: "update"}.get(one.mark or "", "workspaces")


def _by_counters(step: Callable[[], object], model: Model, device: torch.device) -> Account:
    before: list[int] = []
    kept: list[int] = []
    handles = []
    for layer in model.layers:
        handles += [
            layer.register_forward_pre_hook(lambda *_: before.append(torch.cuda.memory_allocated(device))),
            layer.register_forward_hook(lambda *_: kept.append(torch.cuda.memory_allocated(device) - before.pop())),
        ]
    try:
        with measure.Memory(device) as memory:
            step()
    finally:
        for handle in handles:
            handle.remove()
    return Account(layers=sum(kept), peak=memory.peak)
