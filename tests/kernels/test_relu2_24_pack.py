"""Masks and packing of 2:4 groups hold for every group there can be."""

import itertools
import math

import pytest
import torch
from support.relu2_24_oracle import brute_masks

from elas.kernels.relu2_24 import pack

pytestmark = pytest.mark.any_device

NEGATIVE_NAN = math.copysign(math.nan, -1.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def every_group(dtype):
    """All 8⁴ groups of four over values that tie, vanish and overflow, one group a row."""
    values = (-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan, NEGATIVE_NAN)
    return torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_agree_with_brute_force_on_every_group(dtype):
    x = every_group(dtype)
    keep, third = brute_masks(x)
    assert torch.equal(pack.keep_mask(x), keep)
    got_keep, got_third = pack.keep_and_third(x)
    assert torch.equal(got_keep, keep)
    assert torch.equal(got_third, third)


def test_equal_values_keep_the_lower_two_and_index_2_is_third():
    keep, third = pack.keep_and_third(torch.zeros(3, 8))
    assert keep.tolist() == [[True, True, False, False] * 2] * 3
    assert third.tolist() == [[False, False, True, False] * 2] * 3


def test_positions_name_the_kept_two_and_the_third():
    x = every_group(torch.float32)
    keep, third = pack.keep_and_third(x)
    p0, p1 = pack.kept_positions(keep)
    where = [[i for i, kept in enumerate(row) if kept] for row in keep.tolist()]
    assert torch.cat([p0, p1], -1).tolist() == where
    assert pack.one_position(third).flatten().tolist() == [row.index(True) for row in third.tolist()]


@pytest.mark.parametrize("groups", (1, 2, 3, 7, 8))
def test_positions_survive_packing_in_half_a_byte_a_group(groups):
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)), dtype=torch.uint8)
    rows = pairs[torch.randint(6, (200, groups), generator=torch.Generator().manual_seed(groups))]
    p0, p1 = rows.unbind(-1)
    codes = pack.encode(p0, p1)
    assert codes.dtype == torch.uint8
    assert codes.shape == (200, (groups + 1) // 2)
    back = pack.decode(codes, groups)
    assert torch.equal(back[0], p0)
    assert torch.equal(back[1], p1)


def test_even_groups_are_low_nibbles_lower_positions_low_bits():
    p0, p1 = torch.tensor([[0, 2, 1]], dtype=torch.uint8), torch.tensor([[3, 3, 2]], dtype=torch.uint8)
    assert pack.encode(p0, p1).tolist() == [[0b1110_1100, 0b1001]]


def test_third_and_its_sign_survive_packing_in_a_byte_a_group():
    every = list(itertools.product(range(4), range(4), range(4), (0, 1)))
    p0, p1, third, positive = (
        torch.tensor(column, dtype=torch.uint8).view(2, -1) for column in zip(*every, strict=True)
    )
    codes = pack.encode_third(p0, p1, third, positive.bool())
    assert codes.shape == p0.shape
    for got, want in zip(pack.decode_third(codes), (p0, p1, third, positive.bool()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_put_of_take_is_the_masked_activation(dtype):
    x = torch.randn(5, 28, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = pack.keep_mask(x)
    positions = pack.kept_positions(keep)
    kept = pack.take(x, *positions)
    assert kept.shape == (5, 14)
    assert kept.dtype == dtype
    assert torch.equal(pack.put(kept, *positions), torch.where(keep, x, 0))


def test_lanes_and_join_are_inverse_for_strided_input():
    x = torch.randn(3, 2, 32)[..., ::2]
    assert torch.equal(pack.join(list(pack.lanes(x))), x)
