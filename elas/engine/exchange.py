"""Matrices that lie in pieces over the ranks of a pipeline stage: each is whole on one rank for a while, and back.

A matrix is gathered in fp32 on its owner by summing the ranks' parts of it, fragments of ZeRO's partitions as well as
tensor-parallel shards, with zeros elsewhere: exact, so the result does not depend on the layout. Matrices are assigned
to the ranks of a stage in turn, which work on theirs at the same time. What an owner made of a matrix is broadcast to
the stage, and every rank keeps its part.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elas.engine.engine import Engine
from elas.engine.matrices import Rows
from elas.engine.zero import Fragment, fragments, publish, whole_shape, write_rows
from elas.parallel import stage_group

Unit = TypeVar("Unit")


class Exchange:
    """Gathers and spreads matrices of one step. Every rank of the stage calls the same methods in the same order.

    Args:
        engine: whose fp32 weights they are.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.group = stage_group()
        self.ranks, self.rank = dist.get_process_group_ranks(self.group), dist.get_rank()
        self.held: dict[torch.nn.Parameter, Fragment] = {}

    def rounds(self, units: Sequence[Unit]) -> Iterator[list[tuple[Unit, int]]]:
        """Units with their owners, as many at a time as there are ranks."""
        self.held = fragments(self.engine)
        for first in range(0, len(units), len(self.ranks)):
            yield list(zip(units[first : first + len(self.ranks)], self.ranks))
        publish(self.engine)

    def gather(self, rows: Rows, values: Callable[[Fragment], Tensor], owner: int) -> Tensor | None:
        """The whole matrix on its owner, fp32 `[rows, columns]`; None elsewhere.

        Args:
            rows: the matrix.
            values: gives what of it lies in a fragment, `[numel]`: weights, or of the optimizer's state.
            owner: global rank.
        """
        parameter = rows.parameter
        local = torch.zeros(self._local_shape(parameter), dtype=torch.float32, device=torch.cuda.current_device())
        fragment = self.held.get(parameter)
        if fragment is not None and self._contributes(rows):
            local.view(-1).narrow(0, fragment.start, fragment.numel).copy_(values(fragment))
        whole = self._placed(rows, torch.cat([local.narrow(0, *run) for run in rows.runs])).contiguous()
        dist.reduce(whole, dst=owner, group=self.group)
        return whole if owner == self.rank else None

    def spread(self, rows: Rows, new: Tensor | None, owner: int) -> None:
        """Broadcast a matrix from its owner, where it is not None; every rank writes its part into the weights."""
        layout, dim = self.engine.layout, rows.split_dim
        if new is None:
            shape = [rows.count, *self._local_shape(rows.parameter)[1:]]
            if dim is not None:
                shape[dim] *= layout.tp
            new = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        new = new.contiguous()
        dist.broadcast(new, src=owner, group=self.group)
        mine = (new if dim is None else new.chunk(layout.tp, dim)[layout.tp_rank]).contiguous()
        at = 0
        for first, count in rows.runs:
            write_rows(self.engine, rows.parameter, self.held.get(rows.parameter), mine.narrow(0, at, count), first)
            at += count

    def _local_shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return whole_shape(parameter, self.engine.stage)

    def _contributes(self, rows: Rows) -> bool:
        """Whether this rank contributes its part to the sum; of replicas, only one does."""
        layout = self.engine.layout
        return not ((rows.split_dim is None and layout.tp_rank > 0) or (self.engine.stage == 0 and layout.dp_rank > 0))

    def _placed(self, rows: Rows, local: Tensor) -> Tensor:
        """The whole matrix with this rank's tensor-parallel shard in place and zeros elsewhere."""
        layout, dim = self.engine.layout, rows.split_dim
        if layout.tp == 1 or dim is None:
            return local
        before, after = list(local.shape), list(local.shape)
        size = local.shape[dim]
        before[dim], after[dim] = layout.tp_rank * size, (layout.tp - 1 - layout.tp_rank) * size
        return torch.cat([local.new_zeros(before), local, local.new_zeros(after)], dim)
