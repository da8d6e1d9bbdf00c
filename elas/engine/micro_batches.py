"""Between the micro-batches of a step or a validation: progress for people and the watchdog, and leaving early.

A step may take minutes, and whoever asked the run to stop will not wait. So ranks look at the stop flag before a
forward pass, about once a second; a step that is left so early updates nothing, and the run stands after the step
before. Ranks that compute together must look alike, else one would wait for the other in a collective:

- **tensor parallel**, and everybody under ZeRO 2 and 3, agree by a small all-reduce before the pass. When that is due
  is counted in passes, and how many make a second was agreed on after the step before. Fast steps have none at all.
- **data-parallel replicas and pipeline stages** leave when they hear of it. At the end of the pass all ranks agree on
  whether anybody left.

A pipeline must not be left in the middle, as stages wait for each other's activations: from then on its passes hand on
activations without computing any (`idle_output`), so that the schedule runs out in moments.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

LOOK_S = 1.0
"""Seconds between two looks at the stop flag."""


class StopFlag(Protocol):
    """Whether the run was asked to stop; `elas.train.signals.StopRequest` is one."""

    def agree_on_signal(self, group: dist.ProcessGroup | None) -> bool:
        """Whether a rank of a group (None: of all) has heard a signal; each of them calls it."""
        ...


class Progress(Protocol):
    """Shows people which micro-batch runs; `elas.train.progress.Progress` is one."""

    def begin(self, what: str, micro_batches: int = 0) -> None:
        """Something begins, of as many micro-batches."""
        ...

    def at(self, number: int) -> None:
        """This micro-batch begins, counted from 1."""
        ...


class Abandoned(Exception):
    """A step or a validation was left before its end, by all ranks alike; nothing was updated."""


class MicroBatches:
    """Counts the forward passes of this rank, and says when to leave.

    Args:
        stop: the flag; None never leaves.
        mark: called with what this rank is about to do, for the watchdog.
        progress: shows people the same.

    Attributes:
        every: passes between two looks at the flag, the same on every rank.
        left: whether this rank has left the pass under way.
    """

    def __init__(
        self,
        stop: StopFlag | None = None,
        mark: Callable[[str], None] = lambda operation: None,
        progress: Progress | None = None,
    ):
        self.every, self.left = 1, False
        self.mark, self._stop, self._progress = mark, stop, progress
        self._group: dist.ProcessGroup | None = None
        self._operation, self._passes, self._chunks = "", 0, 1
        self._done = self._looks = 0
        self._start = time.perf_counter()

    def together(self, everybody: bool) -> None:
        """Say who computes together: all ranks, or those of this rank's tensor-parallel group."""
        self._group = None if everybody else mpu.get_tensor_model_parallel_group()

    def begin(self, operation: str, micro_batches: int, chunks: int = 1) -> None:
        """A step or a whole validation begins: `micro_batches` through each of this rank's `chunks`."""
        self._operation, self._passes, self._chunks = operation, micro_batches * chunks, chunks
        self._done = self._looks = 0
        self.left, self._start = False, time.perf_counter()
        if self._progress is not None:
            self._progress.begin(operation, micro_batches)

    def next(self) -> bool:
        """Call before each forward pass; whether to leave it out."""
        self._done += 1
        number = -(-self._done // self._chunks)
        self.mark(f"{self._operation}, micro-batch {number} of {self._passes // self._chunks}")
        if self._progress is not None:
            self._progress.at(number)
        if self._stop is not None and not self.left and (self._done - 1) % self.every == 0:
            self._looks += 1
            self.left = self._stop.agree_on_signal(self._group)
        return self.left

    def check(self) -> None:
        """Call on every rank after the passes of a global batch, before anything comes of them.

        Raises:
            Abandoned: some rank has left; on every rank.
        """
        if not self._looks:  # the same on every rank: all have counted as many passes
            return
        self._looks = 0
        left = torch.tensor(int(self.left), device=torch.cuda.current_device())
        dist.all_reduce(left, op=dist.ReduceOp.MAX)
        if left:
            self.left = True
            raise Abandoned

    @property
    def seconds(self) -> float:
        """Of one pass since `begin`, on average."""
        return (time.perf_counter() - self._start) / max(1, self._done)

    def adapt(self, pass_s: float) -> None:
        """Look about once a second from now on; `pass_s` must be the same on every rank."""
        self.every = max(1, int(LOOK_S / max(pass_s, 1e-6)))


def idle_output(model: torch.nn.Module, tokens: torch.Tensor, sequence_shards: int) -> torch.Tensor:
    """What a pipeline stage hands on for a micro-batch that it leaves out: right in shape and graph, and no more.

    Args:
        model: this stage's chunk, its input set by the schedule.
        tokens: `[b, s]`.
        sequence_shards: tensor-parallel ranks under sequence parallelism, else 1.

    Returns:
        Hidden states `[s / shards, b, h]`; on the last stage losses `[b, s]`.
    """
    if model.pre_process:
        dtype = next(model.parameters()).dtype
        shape = (tokens.shape[1] // sequence_shards, tokens.shape[0], model.config.hidden_size)
        hidden = torch.zeros(shape, dtype=dtype, device=tokens.device, requires_grad=True)
    else:
        hidden = model.decoder.input_tensor
    if model.post_process:
        return (hidden.float().sum() * 0).expand(tokens.shape)
    return hidden * 1  # not the input itself: the schedule frees what it has sent
