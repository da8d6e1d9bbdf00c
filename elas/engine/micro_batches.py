"""Between the micro-batches of a step or a validation: reports progress, and abandons the step on a stop request.

A step may take minutes, too long to wait after a stop request. So ranks check the stop flag before a forward pass,
about once a second. An abandoned step updates nothing, so the run is in the state after the previous step. Ranks that
compute together must abandon a pass together, or one would wait for the other in a collective:

- **Tensor-parallel ranks**, and all ranks under ZeRO 2 and 3, agree with a small all-reduce before the pass. It is due
  after a fixed number of passes, about a second's worth, which was agreed on at the end of the previous step. Fast
  steps have none: all ranks exchange the flag once a step anyway.
- **Data-parallel replicas and pipeline stages** abandon the pass as soon as they know of the request. Before the update
  all ranks learn whether any of them did (`elas.engine.engine`).

A pipeline schedule cannot be interrupted, since stages wait for each other's activations. After a request, its passes
send dummy activations (`idle_output`), so that the schedule finishes quickly.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

LOOK_S = 1.0
"""Seconds between two checks of the stop flag."""


class StopFlag(Protocol):
    """Whether the run was asked to stop; `elas.train.signals.StopRequest` is one."""

    def agree_on_signal(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any rank of a group (None: of all ranks) knows of a signal; every rank of it must call this."""
        ...


class Progress(Protocol):
    """Shows which micro-batch is running; `elas.train.progress.Progress` is one."""

    def begin(self, what: str, micro_batches: int = 0) -> None:
        """An operation `what` begins, with this many micro-batches."""
        ...

    def at(self, number: int) -> None:
        """Micro-batch `number`, counted from 1, begins."""
        ...


class Abandoned(Exception):
    """All ranks abandoned a step or a validation; nothing was updated."""


class MicroBatches:
    """Counts the forward passes of this rank, and decides when to abandon a step.

    Args:
        stop: the stop flag; with None, no step is abandoned.
        mark: called with the operation that this rank is about to start, for the watchdog.
        progress: shows the same on the console.

    Attributes:
        every: passes between two checks of the flag, the same on every rank; 1 until a pass was measured.
        left: whether this rank has abandoned the current pass.
    """

    def __init__(
        self,
        stop: StopFlag | None = None,
        mark: Callable[[str], None] = lambda operation: None,
        progress: Progress | None = None,
    ):
        self.every, self.left = 1, False
        self.mark, self._stop, self._progress = mark, stop, progress
        self._operation, self._passes, self._chunks = "", 0, 1
        self._done = 0
        self._start = time.perf_counter()

    def begin(self, operation: str, micro_batches: int, chunks: int = 1) -> None:
        """A step or a validation begins: `micro_batches` through each of this rank's `chunks`."""
        self._operation, self._passes, self._chunks = operation, micro_batches * chunks, chunks
        self._done = 0
        self.left, self._start = False, time.perf_counter()
        if self._progress is not None:
            self._progress.begin(operation, micro_batches)

    def next(self, group: dist.ProcessGroup | None) -> bool:
        """Call before each forward pass; returns whether to skip it.

        Args:
            group: the ranks that abandon a pass together and so check the flag together; None for all ranks.
        """
        self._done += 1
        number = -(-self._done // self._chunks)
        self.mark(f"{self._operation}, micro-batch {number} of {self._passes // self._chunks}")
        if self._progress is not None:
            self._progress.at(number)
        if self._stop is not None and not self.left and self._done % self.every == 0:
            self.left = self._stop.agree_on_signal(group)
        return self.left

    @property
    def seconds(self) -> float:
        """Average seconds of a pass since `begin`."""
        return (time.perf_counter() - self._start) / max(1, self._done)

    def adapt(self, pass_s: float) -> None:
        """Set `every` to about one check per second; `pass_s`, seconds of a pass, must be the same on every rank."""
        self.every = max(1, int(LOOK_S / max(pass_s, 1e-6)))


def idle_output(model: "GPTModel", tokens: torch.Tensor, sequence_shards: int) -> torch.Tensor:
    """The output of a pipeline stage for a skipped micro-batch: the right shape and graph, with meaningless values.

    Args:
        model: this stage's chunk, its input set by the schedule.
        tokens: `[b, s]`.
        sequence_shards: number of tensor-parallel ranks under sequence parallelism, else 1.

    Returns:
        Hidden states `[s / shards, b, h]`; on the last stage a loss, 0-dim.
    """
    if model.pre_process:
        dtype = next(model.parameters()).dtype
        shape = (tokens.shape[1] // sequence_shards, tokens.shape[0], model.config.hidden_size)
        hidden = torch.zeros(shape, dtype=dtype, device=tokens.device, requires_grad=True)
    else:
        hidden = model.decoder.input_tensor
        assert hidden is not None  # the schedule sets it
    if model.post_process:
        return hidden.float().sum() * 0
    return hidden * 1  # a copy, since the schedule frees the tensors that it has sent
