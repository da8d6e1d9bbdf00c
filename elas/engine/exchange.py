"""Matrices that lie in pieces over the ranks of a pipeline stage: each is whole on one rank for a while, and back.

A matrix is gathered in fp32 on its owner by summing the ranks' parts of it, fragments of ZeRO's partitions as well as
tensor-parallel shards, with zeros elsewhere: exact, so the result does not depend on the layout. Matrices are assigned
to the ranks of a stage in turn, which work on theirs at the same time. What an owner made of a matrix is broadcast to
the stage, and every rank keeps its part.
"""

import math
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
Values = Callable[[Fragment], Tensor]


class Exchange:
    """Gathers and spreads matrices of one step. Every rank of the stage calls the same methods in the same order.

    Args:
        engine: whose fp32 weights they are.

    Attributes:
        sent: bytes of the tensors that went through collectives so far; 0 where a stage is one rank.
    """

    def __init__(self, engine: Engine):
        self.engine, self.sent = engine, 0
        self.group = stage_group()
        self.ranks, self.rank = dist.get_process_group_ranks(self.group), dist.get_rank()
        self.held: dict[torch.nn.Parameter, Fragment] = {}

    def rounds(self, units: Sequence[Unit], at_once: int = 1) -> Iterator[list[tuple[list[Unit], int]]]:
        """Units with their owners, `at_once` for each rank at a time; every rank has some but in the last round."""
        self.held = fragments(self.engine)
        size = at_once * len(self.ranks)
        for first in range(0, len(units), size):
            block = units[first : first + size]
            dealt = [(list(block[number :: len(self.ranks)]), rank) for number, rank in enumerate(self.ranks)]
            yield [(some, owner) for some, owner in dealt if some]
        publish(self.engine)

    def gather(self, wanted: Sequence[tuple[Rows, Values]], owner: int) -> list[Tensor]:
        """Whole matrices on their owner, fp32 `[rows, columns]`, views of one tensor; empty elsewhere.

        Args:
            wanted: matrices, and what gives the values of them that lie in a fragment, `[numel]`: weights, or of the
                optimizer's state.
            owner: global rank.
        """
        shapes = [self.shape(rows) for rows, _ in wanted]
        flat = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.float32, device=torch.cuda.current_device())
        wholes = _views(flat, shapes)
        for (rows, values), whole in zip(wanted, wholes):
            fragment = self.held.get(rows.parameter)
            if fragment is not None and self._contributes(rows):
                self._fill(self._mine(whole, rows), rows, fragment, values)
        self._count(flat)
        dist.reduce(flat, dst=owner, group=self.group)
        return wholes if owner == self.rank else []

    def spread(self, changed: Sequence[Rows], new: Sequence[Tensor], owner: int) -> None:
        """Broadcast matrices from their owner, where `new` has them; every rank writes its part into the weights."""
        shapes = [self.shape(rows) for rows in changed]
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=torch.float32, device=torch.cuda.current_device())
        wholes = _views(flat, shapes)
        for whole, value in zip(wholes, new):
            whole.copy_(value)
        self._count(flat)
        dist.broadcast(flat, src=owner, group=self.group)
        for rows, whole in zip(changed, wholes):
            mine, at = self._mine(whole, rows), 0
            for first, count in rows.runs:
                part = mine.narrow(0, at, count).contiguous()
                write_rows(self.engine, rows.parameter, self.held.get(rows.parameter), part, first)
                at += count

    def shape(self, rows: Rows) -> tuple[int, ...]:
        """Of the whole matrix."""
        shape = [rows.count, *self._local_shape(rows.parameter)[1:]]
        if rows.split_dim is not None:
            shape[rows.split_dim] *= self.engine.layout.tp
        return tuple(shape)

    def _count(self, flat: Tensor) -> None:
        if len(self.ranks) > 1:
            self.sent += flat.nbytes

    def _fill(self, mine: Tensor, rows: Rows, fragment: Fragment, values: Values) -> None:
        """Copy what a fragment holds of this rank's shard of a matrix; the fragment may begin and end within a row."""
        shape = self._local_shape(rows.parameter)
        local = torch.zeros(shape, dtype=torch.float32, device=mine.device)
        local.view(-1).narrow(0, fragment.start, fragment.numel).copy_(values(fragment))
        mine.copy_(torch.cat([local.narrow(0, *run) for run in rows.runs]))

    def _mine(self, whole: Tensor, rows: Rows) -> Tensor:
        """This rank's tensor-parallel shard of a matrix: a view."""
        layout, dim = self.engine.layout, rows.split_dim
        return whole if dim is None else whole.chunk(layout.tp, dim)[layout.tp_rank]

    def _local_shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return whole_shape(parameter, self.engine.stage)

    def _contributes(self, rows: Rows) -> bool:
        """Whether this rank contributes its part to the sum; of replicas, only one does."""
        layout = self.engine.layout
        return not ((rows.split_dim is None and layout.tp_rank > 0) or (self.engine.stage == 0 and layout.dp_rank > 0))


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]
