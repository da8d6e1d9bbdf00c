"""Tile sizes of the fused Triton kernels, by chip, dtype and rank; no import of Triton.

Shapes: `r` the wider of `r_in`, `r_out`, the widths of the two ends of the core.

Found by compiling ahead of time some 150 times: large tiles that spill no register and fit the shared memory of a
block, which tests/kernels/test_relu2_24_triton_aot.py holds them to, with Triton 3.7.1 (3.9.0 wants more registers and
spills in some of sm_90). None was timed: a GPU that can time them may find better ones.

The accumulators set the size. A program holds its output in fp32, a tile × rank: 64 × 256 values are 64 registers of
each of 256 threads, and `weights_kernel` holds two. GAP says which register of a thread holds the second pair of a
group (triton/groups.py): 8 columns on where wgmma gives warps rows, half a tile where mma gives warps columns (and
of several columns a thread has none beside it: there values do move between threads, through shared memory).

Ranks beyond the tables have no tile: a program would hold a part of its output and compute z once for every part.
fp32 is for TF32 products; exact ones are no tensor-core products and spill in every tile.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "du", "weights"]

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_8x": 101_376}
"""Shared memory a block may take; sm_8x are the smaller chips, sm_86 to sm_89 and sm_12x."""


@dataclass(frozen=True)
class Tile:
    """Tokens and features of a tile, gap of a group's pairs, and warps and pipeline stages of a program.

    `chunk` is the number of inner columns taken at once, a power of two from 16; None takes the rank whole.
    """

    tokens: int
    features: int
    gap: int
    warps: int
    stages: int
    chunk: int | None = None

    def columns(self, r: int) -> int:
        """Inner columns taken at once of r: a power of two, at least the 16 of the smallest product."""
        whole = max(16, 1 << (r - 1).bit_length())
        return whole if self.chunk is None else min(whole, self.chunk)


_BF16: dict[str, dict[Kernel, dict[int, Tile]]] = {
    "sm_90": {
        "forward": {128: Tile(128, 128, 8, 8, 2), 256: Tile(128, 64, 8, 8, 2), 512: Tile(64, 32, 8, 8, 2)},
        "du": {128: Tile(128, 64, 8, 8, 3), 256: Tile(64, 64, 8, 8, 2), 512: Tile(64, 16, 8, 8, 2)},
        "weights": {128: Tile(64, 64, 8, 8, 3), 256: Tile(64, 64, 8, 8, 2), 512: Tile(32, 32, 8, 8, 2)},
    },
    "sm_80": {
        "forward": {128: Tile(64, 64, 32, 4, 2), 256: Tile(64, 64, 32, 8, 2), 512: Tile(32, 32, 16, 8, 2)},
        "du": {128: Tile(64, 64, 32, 4, 2), 256: Tile(64, 32, 8, 8, 2), 512: Tile(32, 32, 16, 8, 1)},
        "weights": {128: Tile(64, 32, 8, 4, 2), 256: Tile(64, 32, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
    "sm_8x": {
        "forward": {128: Tile(64, 64, 32, 4, 2), 256: Tile(32, 64, 32, 4, 2), 512: Tile(32, 32, 16, 8, 1)},
        "du": {128: Tile(32, 64, 32, 4, 2), 256: Tile(16, 32, 16, 4, 2), 512: Tile(16, 32, 16, 4, 2)},
        "weights": {128: Tile(32, 32, 8, 4, 2), 256: Tile(64, 16, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
}

_BF16_SOFT: dict[str, dict[Kernel, dict[int, Tile]]] = {
    "sm_90": {"forward": {512: Tile(64, 16, 8, 8, 3)}, "weights": {256: Tile(64, 32, 8, 8, 2)}},
    "sm_80": {"weights": {256: Tile(64, 16, 8, 8, 1)}},
    "sm_8x": {},
}
"""Instead of those above for the soft threshold, which needs more registers."""

_FP32: dict[str, dict[Kernel, dict[int, Tile]]] = {
    "sm_90": {
        "forward": {128: Tile(64, 64, 8, 4, 2), 256: Tile(64, 32, 8, 8, 2), 512: Tile(32, 16, 8, 8, 1)},
        "du": {128: Tile(64, 32, 8, 4, 2), 256: Tile(32, 16, 8, 8, 2), 512: Tile(16, 16, 8, 4, 1)},
        "weights": {128: Tile(32, 32, 8, 8, 2), 256: Tile(32, 32, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
    "sm_80": {
        "forward": {128: Tile(64, 32, 16, 4, 2), 256: Tile(32, 32, 16, 8, 2), 512: Tile(16, 16, 8, 4, 1)},
        "du": {128: Tile(32, 32, 16, 4, 1), 256: Tile(32, 16, 8, 8, 1), 512: Tile(16, 16, 8, 4, 1)},
        "weights": {128: Tile(32, 32, 8, 8, 1), 256: Tile(16, 16, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
    "sm_8x": {
        "forward": {128: Tile(64, 32, 16, 4, 2), 256: Tile(32, 32, 16, 8, 1)},
        "du": {128: Tile(32, 32, 16, 4, 1), 256: Tile(16, 16, 8, 4, 1)},
        "weights": {128: Tile(32, 32, 8, 8, 1), 256: Tile(16, 16, 8, 8, 1)},
    },
}


def chip(capability: tuple[int, int]) -> str | None:
    """The row of the tables for a compute capability; None where there is none.

    Below 8.0 there are no bf16 products. On 10.x and 11.x sums lie in a memory of their own, products take more shared
    memory, and the tiles of sm_90 do not fit.
    """
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (8, 12):
        return "sm_80" if capability == (8, 0) else "sm_8x"
    return None


def choose(chip: str, kernel: Kernel, dtype: torch.dtype, r: int, soft: bool = False) -> Tile | None:
    """The tile for a rank up to one of the table's; None beyond the last, and for a dtype it does not know.

    Args:
        chip: as `chip` gives it.
        kernel: which of the three.
        dtype: of the operands.
        r: the wider of the two inner widths.
        soft: whether the method is the soft threshold.
    """
    tables = {torch.bfloat16: _BF16, torch.float32: _FP32}
    ranks = dict(tables[dtype][chip][kernel]) if dtype in tables else {}
    if soft and dtype == torch.bfloat16:
        ranks.update(_BF16_SOFT[chip].get(kernel, {}))
    return next((tile for widest, tile in sorted(ranks.items()) if r <= widest), None)
