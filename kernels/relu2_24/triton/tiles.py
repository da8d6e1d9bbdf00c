"""Tile sizes of the fused Triton kernels, by chip, dtype and rank; no import of Triton.

Shapes: `r` the wider of `r_in` and `r_out`, the widths of u and v.

The tiles spill no register and fit in the shared memory of a block; tests/kernels/test_relu2_24_triton_aot.py checks
both with Triton 3.7.1 (3.9.0 requires more registers and spills in some of sm_90). Those of sm_90 in bf16 are the
fastest of `elas tune` on an H100 (tuned/ has the times); the others are the largest of about 150 compiled ahead of time
and not timed. What `elas tune` has measured on a user's GPU comes before these (tuned.py).

The accumulators limit the size. A program holds its output in fp32, tile × rank: 64 × 256 values take 64 registers of
each of 256 threads, and `weights_kernel` holds two such outputs. GAP is the distance in columns to the second pair of a
group (triton/groups.py): 8 where wgmma assigns rows to warps, half a tile where mma assigns columns to warps (where a
thread does not hold both, values move between threads through shared memory).

Ranks beyond the tables have no tile: a program would hold a part of its output and compute z again for every part. The
fp32 tables are for TF32 products; exact fp32 products do not use tensor cores and spill in every tile.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "du", "weights"]

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_8x": 101_376, "sm_100": 232_448}
"""Shared memory that a block may use; sm_8x are the smaller chips, sm_86 to sm_89 and sm_12x."""


@dataclass(frozen=True)
class Tile:
    """Tokens and features of a tile, gap between a group's pairs, and warps and pipeline stages of a program.

    `chunk` is the number of columns that a product processes at once, a power of two of at least 16; None: all.
    """

    tokens: int
    features: int
    gap: int
    warps: int
    stages: int
    chunk: int | None = None

    def columns(self, r: int) -> int:
        """Columns of r that are processed at once: a power of two of at least 16, the smallest product."""
        whole = max(16, 1 << (r - 1).bit_length())
        return whole if self.chunk is None else min(whole, self.chunk)


_BF16: dict[str, dict[Kernel, dict[int, Tile]]] = {
    "sm_90": {
        "forward": {128: Tile(128, 64, 8, 8, 3), 256: Tile(128, 32, 8, 8, 4), 512: Tile(64, 32, 8, 8, 2)},
        "du": {128: Tile(128, 64, 8, 8, 4), 256: Tile(128, 32, 8, 8, 3), 512: Tile(64, 16, 8, 8, 3)},
        "weights": {128: Tile(64, 64, 8, 4, 2), 256: Tile(128, 64, 8, 8, 1), 512: Tile(32, 16, 8, 4, 2)},
    },
    "sm_80": {
        "forward": {128: Tile(64, 64, 32, 4, 2), 256: Tile(64, 64, 32, 8, 2), 512: Tile(32, 32, 16, 8, 2)},
        "du": {128: Tile(64, 64, 32, 4, 2), 256: Tile(64, 32, 8, 8, 2), 512: Tile(32, 32, 16, 8, 1)},
        "weights": {128: Tile(64, 32, 8, 4, 2), 256: Tile(64, 32, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
    "sm_100": {
        "forward": {128: Tile(128, 128, 8, 8, 1), 256: Tile(128, 128, 8, 8, 1), 512: Tile(64, 64, 8, 8, 1)},
        "du": {128: Tile(128, 128, 8, 8, 1), 256: Tile(128, 64, 8, 8, 1), 512: Tile(32, 64, 8, 8, 2)},
        "weights": {128: Tile(128, 64, 8, 8, 1), 256: Tile(64, 64, 8, 8, 1), 512: Tile(32, 64, 8, 8, 2)},
    },
    "sm_8x": {
        "forward": {128: Tile(64, 64, 32, 4, 2), 256: Tile(32, 64, 32, 4, 2), 512: Tile(32, 32, 16, 8, 1)},
        "du": {128: Tile(32, 64, 32, 4, 2), 256: Tile(16, 32, 16, 4, 2), 512: Tile(16, 32, 16, 4, 2)},
        "weights": {128: Tile(32, 32, 8, 4, 2), 256: Tile(64, 16, 8, 8, 1), 512: Tile(16, 16, 8, 8, 1)},
    },
}

_BF16_SOFT: dict[str, dict[Kernel, dict[int, Tile]]] = {
    "sm_90": {
        "forward": {512: Tile(64, 16, 8, 8, 3)},
        "weights": {128: Tile(64, 64, 8, 8, 3), 256: Tile(64, 32, 8, 8, 2), 512: Tile(32, 32, 8, 8, 2)},
    },
    "sm_80": {"weights": {256: Tile(64, 16, 8, 8, 1)}},
    "sm_100": {"forward": {512: Tile(32, 64, 8, 8, 1)}, "du": {512: Tile(32, 32, 8, 8, 2)}},
}
"""Replace those above for the soft threshold, which requires more registers."""

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
    """The row of the tables for a compute capability; None if there is none.

    Below 8.0 there are no bf16 products. On 10.x sums are in a separate memory of 512 columns, which limits tiles
    further, and there are tiles for bf16 alone.
    """
    if capability[0] == 10:
        return "sm_100"
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (8, 12):
        return "sm_80" if capability == (8, 0) else "sm_8x"
    return None


def choose(chip: str, kernel: Kernel, dtype: torch.dtype, r: int, soft: bool = False) -> Tile | None:
    """The tile of the smallest rank in the table that is at least r; None if there is none, or none for the dtype.

    Args:
        chip: from `chip`.
        kernel: which of the three.
        dtype: of the operands.
        r: the wider of r_in and r_out.
        soft: whether the method is the soft threshold.
    """
    tables = {torch.bfloat16: _BF16, torch.float32: _FP32}
    ranks = dict(tables[dtype].get(chip, {}).get(kernel, {})) if dtype in tables else {}
    if soft and dtype == torch.bfloat16:
        ranks.update(_BF16_SOFT.get(chip, {}).get(kernel, {}))
    return next((tile for widest, tile in sorted(ranks.items()) if r <= widest), None)
