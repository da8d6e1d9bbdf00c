"""Matrices that lie in pieces over the ranks of a pipeline stage: each is whole on one rank for a while, and back.

Ranks hold fragments of ZeRO's partitions and tensor-parallel shards. Matrices are dealt to the ranks of a stage in
turn; an all-to-all sends every piece to its matrix's owner, so that what a rank sends shrinks with the number of ranks.
Owners work at the same time. `give_back` returns to each rank the part that it holds. Pieces are copied, never added,
so the result does not depend on the layout.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elas.engine.matrices import Rows
from elas.engine.zero import Fragment, homes, publish, whole_shape, write_rows
from elas.parallel import stage_group

if TYPE_CHECKING:
    from elas.engine.engine import Engine

Unit = TypeVar("Unit")
Values = Callable[[Fragment], Tensor]


@dataclass(frozen=True)
class _Member:
    """A rank of the stage, and what it holds: first element and number of them, by the place of the parameter."""

    tp_rank: int
    dp_rank: int
    held: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Piece:
    """A range of a matrix that a rank holds: where it begins in its shard's rows, and in its fragment."""

    at: int
    offset: int
    count: int


class Exchange:
    """Moves matrices. Every rank of the stage calls the same methods in the same order.

    Args:
        engine: whose fp32 weights they are.

    Attributes:
        sent: bytes that this rank has sent to others so far.
        homes: this rank's fragments by parameter, empty ones too, as of the last `begin`.
    """

    def __init__(self, engine: "Engine"):
        self.engine, self.sent = engine, 0
        self.group = stage_group()
        self.ranks, self.rank = dist.get_process_group_ranks(self.group), dist.get_rank()
        self.homes: dict[torch.nn.Parameter, Fragment] = {}
        self._me = self.ranks.index(self.rank)
        self._places: dict[torch.nn.Parameter, int] = {}
        self._members: list[_Member] = []

    def begin(self) -> None:
        """Look where weights are; before the first round. What other ranks hold does not change and is asked once."""
        self.homes = homes(self.engine)
        if self._members:
            return
        parameters = dict.fromkeys(p for chunk in self.engine.chunks for p in chunk.parameters())
        self._places = {parameter: place for place, parameter in enumerate(parameters)}
        held = tuple((self.homes[p].start, self.homes[p].numel) if p in self.homes else (0, 0) for p in parameters)
        mine = _Member(self.engine.layout.tp_rank, self.engine.layout.dp_rank, held)
        everywhere: list[_Member] = [mine] * len(self.ranks)
        dist.all_gather_object(everywhere, mine, group=self.group)
        self._members = everywhere

    def rounds(self, units: Sequence[Unit], at_once: int = 1) -> Iterator[list[tuple[list[Unit], int]]]:
        """Units with their owners, `at_once` for each rank at a time; every rank has some but in the last round."""
        size = at_once * len(self.ranks)
        for first in range(0, len(units), size):
            block = units[first : first + size]
            dealt = [(list(block[number :: len(self.ranks)]), rank) for number, rank in enumerate(self.ranks)]
            yield [(some, owner) for some, owner in dealt if some]

    def gather(self, owned: Sequence[tuple[Sequence[tuple[Rows, Values]], int]]) -> list[Tensor]:
        """Whole matrices on their owners.

        Args:
            owned: for each owner, in the order of `rounds`, the matrices of it, and what gives the values of them that
                lie in a fragment, `[numel]`: weights, or of the optimizer's state.

        Returns:
            This rank's, fp32 `[rows, columns]`, in that order.
        """
        wanted = {self.ranks.index(owner): some for some, owner in owned}
        parts: list[list[Tensor]] = [[] for _ in self.ranks]
        for owner, some in wanted.items():
            for rows, values in some:
                pieces = self._contributed(rows, self._me, owner)
                if pieces:
                    found = values(self.homes[rows.parameter])
                    parts[owner] += [found.narrow(0, piece.offset, piece.count) for piece in pieces]
        mine = wanted.get(self._me, ())
        expected = [[self._contributed(rows, k, self._me) for rows, _ in mine] for k in range(len(self.ranks))]
        received = self._all_to_all(parts, [_total(some) for some in expected])
        shapes = [self.shape(rows) for rows, _ in mine]
        sizes = [math.prod(shape) for shape in shapes]
        blank = self._empty((sum(sizes),)).zero_()  # one launch for all
        wholes = [part.view(shape) for part, shape in zip(blank.split(sizes), shapes, strict=True)]
        for number, (rows, _) in enumerate(mine):
            shards = self._shards(wholes[number], rows)
            flat = [shard.reshape(-1) for shard in shards]  # copies, if the matrix is split by columns
            for some, values, member in zip(expected, received, self._members, strict=True):
                for piece in some[number]:
                    target = flat[member.tp_rank % len(flat)]
                    target.narrow(0, piece.at, piece.count).copy_(values(piece.count))
            for shard, one in zip(shards, flat, strict=True):
                if not shard.is_contiguous():
                    shard.copy_(one.view(shard.shape))
        return wholes

    def give_back(
        self, owned: Sequence[tuple[Sequence[Rows], int]], new: Sequence[Tensor]
    ) -> Iterator[tuple[Fragment, int, Tensor]]:
        """What owners made of matrices, to whoever holds a part of them.

        Args:
            owned: the matrices of each owner.
            new: this rank's, whole.

        Yields:
            Fragments of this rank, the offset of a range in it, and the values of that range, fp32.
        """
        wanted = {self.ranks.index(owner): some for some, owner in owned}
        parts: list[list[Tensor]] = [[] for _ in self.ranks]
        for whole, rows in zip(new, wanted.get(self._me, ()), strict=True):
            flat = [shard.reshape(-1) for shard in self._shards(whole, rows)]
            for part, member in zip(parts, self._members, strict=True):
                source = flat[member.tp_rank % len(flat)]
                part += [source.narrow(0, piece.at, piece.count) for piece in self._pieces(rows, member)]
        here = self._members[self._me]
        changed = [wanted.get(owner, ()) for owner in range(len(self.ranks))]
        expected = [[self._pieces(rows, here) for rows in some] for some in changed]
        received = self._all_to_all(parts, [_total(some) for some in expected])
        for some, several, values in zip(changed, expected, received, strict=True):
            for rows, pieces in zip(some, several, strict=True):
                for piece in pieces:
                    yield self.homes[rows.parameter], piece.offset, values(piece.count)

    def spread(self, changed: Sequence[Rows], new: Sequence[Tensor], owner: int) -> None:
        """Broadcast matrices from their owner, where `new` has them; every rank writes its part into the weights.

        For what follows DeepSpeed's step, so that weights of each dtype change as well as their fp32 copies.
        """
        shapes = [self.shape(rows) for rows in changed]
        flat = self._empty((sum(map(math.prod, shapes)),))
        wholes = [part.view(shape) for part, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes)]
        for whole, value in zip(wholes, new):
            whole.copy_(value)
        if len(self.ranks) > 1:
            self.sent += flat.nbytes
        dist.broadcast(flat, src=owner, group=self.group)
        for rows, whole in zip(changed, wholes):
            shards, at = self._shards(whole, rows), 0
            mine = shards[self.engine.layout.tp_rank % len(shards)]
            held = self.homes.get(rows.parameter)
            for first, count in rows.runs:
                part = mine.narrow(0, at, count).contiguous()
                write_rows(self.engine, rows.parameter, held if held and held.numel else None, part, first)
                at += count

    def publish(self) -> None:
        """After the last `spread`: weights that ZeRO 3 keeps whole on every rank."""
        publish(self.engine)

    def shape(self, rows: Rows) -> tuple[int, ...]:
        """Of the whole matrix."""
        shape = [rows.count, *self._local_shape(rows.parameter)[1:]]
        if rows.split_dim is not None:
            shape[rows.split_dim] *= self.engine.layout.tp
        return tuple(shape)

    def _all_to_all(self, parts: list[list[Tensor]], sizes: list[int]) -> list["_Read"]:
        """Send `parts[k]` to rank k of the group, fp32; receive `sizes[k]` values from it."""
        given = [sum(part.numel() for part in some) for some in parts]
        flat = [part.reshape(-1).float() for some in parts for part in some]
        outgoing = torch.cat(flat) if flat else self._empty((0,))
        incoming = outgoing
        if len(self.ranks) > 1:
            incoming = self._empty((sum(sizes),))
            dist.all_to_all_single(incoming, outgoing, sizes, given, group=self.group)
            self.sent += 4 * (sum(given) - given[self._me])
        return [_Read(part) for part in incoming.split(sizes)]

    def _contributed(self, rows: Rows, k: int, owner: int) -> Sequence[_Piece]:
        """What rank k sends to the owner: all that it holds; of replicas, those in the owner's place do."""
        member, to = self._members[k], self._members[owner]
        replica = (rows.split_dim is None and member.tp_rank != to.tp_rank) or (
            self.engine.stage == 0 and member.dp_rank != to.dp_rank
        )
        return () if replica else self._pieces(rows, member)

    def _pieces(self, rows: Rows, member: _Member) -> list[_Piece]:
        start, numel = member.held[self._places[rows.parameter]]
        columns = math.prod(self._local_shape(rows.parameter)[1:])
        found, at = [], 0
        for first, count in rows.runs:
            begin, end = first * columns, (first + count) * columns
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                found.append(_Piece(at + low - begin, low - start, high - low))
            at += end - begin
        return found

    def _shards(self, whole: Tensor, rows: Rows) -> Sequence[Tensor]:
        """A matrix by tensor-parallel ranks: views, or itself alone if each has all of it."""
        dim = rows.split_dim
        return (whole,) if dim is None else whole.chunk(self.engine.layout.tp, dim)

    def _local_shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return whole_shape(parameter, self.engine.stage)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())


class _Read:
    """Reads a flat tensor from its beginning: a call gives the next values."""

    def __init__(self, flat: Tensor):
        self._flat, self._at = flat, 0

    def __call__(self, count: int) -> Tensor:
        found = self._flat.narrow(0, self._at, count)
        self._at += count
        return found


def _total(several: Sequence[Sequence[_Piece]]) -> int:
    return sum(piece.count for pieces in several for piece in pieces)
