"""Stretches of a flattened shard as rectangles of the whole tensor."""

import random
from itertools import pairwise

import pytest
import torch

from elas.checkpoint.tensors import PartOfTensor, Place


@pytest.mark.parametrize("seed", range(40))
def test_parts_of_all_ranks_are_the_whole_and_none_twice(seed):
    random_ = random.Random(seed)
    tp, stride, dims = random_.choice([1, 2, 4]), random_.choice([1, 2]), random_.choice([1, 2])
    full = [random_.randint(1, 4) * tp * stride for _ in range(dims)]
    dim = random_.choice([None, *range(dims)])
    stride = stride if dim == 0 else 1
    tensor, got = torch.arange(torch.Size(full).numel()).view(full), torch.full(full, -1)
    for rank in range(1 if dim is None else tp):
        shard = tensor if dim is None else torch.cat(tensor.chunk(stride * tp, dim=dim)[rank::tp], dim=dim)
        place = Place(tuple(shard.shape), tuple(full), dim, rank, stride)
        flat = shard.reshape(-1)
        cuts = sorted({0, flat.numel(), *(random_.randrange(flat.numel() + 1) for _ in range(3))})
        for begin, end in pairwise(cuts):
            part = PartOfTensor.of(place, flat[begin:end], begin)
            assert tuple(part.shape) == tuple(full) and len(part.parts) <= 3 * stride
            for offsets, values in part.parts.items():
                where = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape))
                assert (got[where] == -1).all()
                got[where] = values
    assert torch.equal(got, tensor)


def test_parts_are_views_and_copies_are_not():
    flat = torch.zeros(6)
    part = PartOfTensor.of(Place((3, 4), (3, 4)), flat, 3)
    copy = part.copied()
    flat.fill_(1)
    assert all(values.eq(1).all() for values in part.parts.values())
    assert all(values.eq(0).all() for values in copy.parts.values()) and list(copy.parts) == list(part.parts)
