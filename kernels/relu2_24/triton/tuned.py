"""Tiles that were measured: `elas tune` writes them, the fused kernels look here before the tables of tiles.py.

A file holds the tiles of one GPU. Two folders are searched: the user's cache, which `elas tune` writes
(`~/.cache/elas/tiles`), then `tuned/` beside this file, which ships. A file is JSON:

    {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-26", "tiles": [
      {"kernel": "forward", "dtype": "bfloat16", "method": "magnitude", "r_in": 128, "r_out": 128,
       "tile": {"tokens": 128, "features": 64, "gap": 8, "warps": 8, "stages": 2, "chunk": null},
       "us": 61.2, "default_us": 70.3, "tflops": 283.0}, …]}

`method` is magnitude (also served: dense) or soft_threshold. Widths are those that were measured; others take the tile
of the nearest entry whose accumulators are as wide (a power of two), or the table's.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from elas.errors import UserError
from elas.extensions import cache_dir
from elas.kernels.relu2_24.triton.tiles import Kernel, Tile

SHIPPED = Path(__file__).resolve().parent / "tuned"


def user_folder() -> Path:
    """Where `elas tune` writes: `$XDG_CACHE_HOME/elas/tiles`, or `~/.cache/elas/tiles`."""
    return cache_dir() / "tiles"


def file_name(gpu: str) -> str:
    """Of a GPU's file: its name in lower case, words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def read(path: Path) -> dict[tuple, Tile]:
    """Tiles of a file by `(kernel, dtype, method, r_in, r_out)`; empty if there is no file.

    Raises:
        UserError: the file is damaged; the message says to delete it.
    """
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return dict(map(_entry, content["tiles"]))
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a table of tiles ({error}); delete it, `elas tune` makes a new one") from error


def _entry(row: dict[str, Any]) -> tuple[tuple, Tile]:
    """A row as key and tile.

    Raises:
        ValueError: a value that no tile or width can have.
    """
    tile = Tile(**row["tile"])
    numbers = {key: row[key] for key in ("r_in", "r_out")} | vars(tile)
    for name, value in numbers.items():
        if name == "chunk" and value is None:
            continue
        if (
            type(value) is not int
            or not 0 < value <= 4096
            or (name not in ("r_in", "r_out", "stages") and value & (value - 1))
        ):
            raise ValueError(f"{name}={value!r}")
    return (row["kernel"], row["dtype"], row["method"], row["r_in"], row["r_out"]), tile


@functools.lru_cache(maxsize=8)
def _tables(gpu: str) -> tuple[dict[tuple, Tile], ...]:
    return tuple(read(folder / file_name(gpu)) for folder in (user_folder(), SHIPPED))


def forget() -> None:
    """Read the files again at the next call."""
    _tables.cache_clear()
    find.cache_clear()


@functools.lru_cache(maxsize=256)
def find(gpu: str, kernel: Kernel, dtype: torch.dtype, r_in: int, r_out: int, soft: bool) -> Tile | None:
    """The measured tile for these widths on this GPU, or None.

    Args:
        gpu: its name, from `torch.cuda.get_device_name`.
        kernel: which of the three.
        dtype: of the operands.
        r_in: width of u.
        r_out: width of v.
        soft: whether the method is the soft threshold.
    """
    head = (kernel, str(dtype).removeprefix("torch."), "soft_threshold" if soft else "magnitude")
    wide = _power(max(r_in, r_out))
    for table in _tables(gpu):
        near = [key for key in table if key[:3] == head and _power(max(key[3:])) == wide]
        if near:
            return table[min(near, key=lambda key: abs(key[3] - r_in) + abs(key[4] - r_out))]
    return None


def _power(r: int) -> int:
    """Columns that a program holds for a width: a power of two."""
    return max(16, 1 << (r - 1).bit_length())
