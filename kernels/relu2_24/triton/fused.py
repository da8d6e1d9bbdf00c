"""`Passes` of fused memory with Triton kernels: layouts, grids, sums of shares. Triton is imported at first use.

Shapes: `f` features, `n` tokens, `r_in` and `r_out` widths of u and v.
"""

import contextlib
import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands
from elas.kernels.relu2_24.plain.fused import TorchFused
from elas.kernels.relu2_24.registry import Implementation, Widths, register
from elas.kernels.relu2_24.triton import tuned
from elas.kernels.relu2_24.triton.tiles import Kernel, Tile, chip, choose

PRIORITY = 20
"""Higher than every other implementation."""

FASTEST_UP_TO = 256
"""Widths; measured on an H100 in bf16 (docs/kernels.md): at 512 the three kernels need 3.8 ms where six products and
passes over memory need 1.2."""

PROGRAMS_PER_PROCESSOR = 2
"""Tokens are split so that `weights_kernel` has this many programs for each processor of the chip."""


def passes_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's passes over z cannot run on `device` in `dtype`, or None; products are PyTorch's there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"its kernels are for NVIDIA GPUs, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'elas[gpu]')"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "it requires compute capability 8.0 or later, not {}.{}".format(*capability)
    if dtype == torch.float64:
        return "its kernels do not support float64"
    return None


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused kernels cannot run on `device` in `dtype`, or None."""
    if (reason := passes_obstacle(device, dtype)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if chip(capability) is None:
        return "it has tiles for compute capability 8.x, 9.x, 10.0 and 12.x, not {}.{}".format(*capability)
    if precision_of(dtype) == "ieee" and dtype == torch.float32:
        return "in fp32 it multiplies in TF32, which torch.set_float32_matmul_precision('high') allows"
    return None


def misfit(widths: Widths, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused kernels have no tile for these widths, or None."""
    if min(widths.r_in, widths.r_out) == 0 or _tiled(widths.r_in, widths.r_out, device, dtype):
        return None
    return f"it has no tile for widths r_in={widths.r_in}, r_out={widths.r_out} of the core in {dtype}"


@functools.lru_cache(maxsize=64)
def _tiled(r_in: int, r_out: int, device: torch.device, dtype: torch.dtype) -> bool:
    return choose(chip_of(device), "forward", dtype, max(r_in, r_out)) is not None


@functools.lru_cache(maxsize=256)
def _measured(kernel: Kernel, device: torch.device, dtype: torch.dtype, r_in: int, r_out: int, soft: bool):
    if device.type != "cuda":
        return None
    return tuned.find(torch.cuda.get_device_name(device), kernel, dtype, r_in, r_out, soft)


def forget_tiles() -> None:
    """Look for measured tiles again at the next call, after `elas tune`."""
    tuned.forget()
    _measured.cache_clear()


def chip_of(device: torch.device) -> str:
    """The row of the tile tables for `device`; where there is no GPU (the interpreter), H100's."""
    found = chip(torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0))
    assert found is not None, "`obstacle` refuses chips without tiles"
    return found


def on(x: Tensor) -> AbstractContextManager:
    """A context in which the device of x is current; Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def method_of(options: Relu24Options) -> int:
    """The method as the kernels' constant (triton/groups.py)."""
    if not options.sparse:
        return 0
    return 1 if options.method == "magnitude" else 2


def scale_of(options: Relu24Options) -> float:
    """β, the factor of s; 1 for methods without one."""
    return float(options.scale) if method_of(options) == 2 else 1.0


def precision_of(dtype: torch.dtype) -> str:
    """`input_precision` of fp32 products, as `torch.set_float32_matmul_precision` sets it for PyTorch."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def kernels_of(memory: str) -> Any:
    """The module of the `fused` or `compressed` kernels, as Any: Triton has no types for a launch."""
    return importlib.import_module(f"elas.kernels.relu2_24.triton.{memory}_kernels")


def _in_rows(x: Tensor) -> Tensor:
    """x, copied if its rows are not contiguous in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


class TritonFused:
    """`Passes` of fused memory.

    Args:
        tile: the tile of every kernel instead of the table's (tests; tuning by hand).

    Widths must have a tile (`misfit`). Those of 0, with nothing to compute, are left to PyTorch.
    """

    def __init__(self, tile: Tile | None = None):
        self.tile = tile
        self.plain = TorchFused()

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """`v [n, r_out]`; keeps nothing."""
        u, m_up, n_down = operands
        if min(u.shape[1], n_down.shape[0]) == 0:
            return self.plain.forward(operands, options, keep)
        u, m, n = _in_rows(u), _in_rows(m_up), n_down.T.contiguous()
        v = u.new_empty(u.shape[0], n_down.shape[0])
        if v.shape[0]:
            tile, constants = self._settings("forward", u, n, options)
            grid = (-(-v.shape[0] // tile.tokens), -(-v.shape[1] // constants["BO"]))
            strides = (u.stride(0), m.stride(0), n.stride(0), v.stride(0))
            with on(u):
                kernels_of("fused").forward_kernel[grid](
                    u, m, n, v, u.shape[0], m.shape[0], *strides, scale_of(options), **constants
                )
        return v, ()

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """du, dm_up, dn_down, by one kernel over tokens and one over features."""
        u, m_up, n_down = operands
        if min(u.shape[1], n_down.shape[0]) == 0:
            return self.plain.backward(operands, kept, dv, options, needs)
        u, m, n, dv = _in_rows(u), _in_rows(m_up), n_down.T.contiguous(), _in_rows(dv)
        du = self._du(u, m, n, dv, options) if needs[0] else None
        return du, *self._weights(u, m, n, dv, options, needs[1:])

    def _du(self, u: Tensor, m: Tensor, n: Tensor, dv: Tensor, options: Relu24Options) -> Tensor:
        du = u.new_empty(u.shape)
        if du.shape[0]:
            tile, constants = self._settings("du", u, n, options)
            grid = (-(-du.shape[0] // tile.tokens), -(-du.shape[1] // constants["BI"]))
            strides = tuple(x.stride(0) for x in (u, m, n, dv, du))
            ste = options.gradient == "ste"
            with on(u):
                kernels_of("fused").du_kernel[grid](
                    u, m, n, dv, du, u.shape[0], m.shape[0], *strides, scale_of(options), STE=ste, **constants
                )
        return du

    def _weights(
        self, u: Tensor, m: Tensor, n: Tensor, dv: Tensor, options: Relu24Options, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """dm_up, dn_down: programs split f and tokens; the shares of tokens are added in fp32."""
        if not any(needs):
            return None, None
        (tokens, r_in), (f, r_out) = u.shape, n.shape
        tile, constants = self._settings("weights", u, n, options)
        tiles = -(-f // tile.features)
        share = self._share(tokens, tiles, tile, u.device, max(u.stride(0), dv.stride(0), 1))
        shares = max(1, -(-tokens // share))
        dm, dn = (u.new_empty(shares, f, r, dtype=torch.float32) for r in (r_in, r_out))
        chunks = max(-(-r_in // constants["BI"]), -(-r_out // constants["BO"]))
        strides = tuple(x.stride(0) for x in (u, m, n, dv))
        more = {"STE": options.gradient == "ste", "NEEDS_M": needs[0], "NEEDS_N": needs[1], **constants}
        if f:
            with on(u):
                kernels_of("fused").weights_kernel[(tiles, shares, chunks)](
                    u, m, n, dv, dm, dn, tokens, f, share, *strides, scale_of(options), **more
                )
        return (
            dm.sum(0).to(u.dtype) if needs[0] else None,
            dn.sum(0).to(u.dtype).T.contiguous() if needs[1] else None,
        )

    def _share(self, tokens: int, tiles: int, tile: Tile, device: torch.device, stride: int) -> int:
        """Tokens that a program of `weights_kernel` sums, a multiple of its tile; their offsets fit in 31 bits."""
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        shares = max(1, PROGRAMS_PER_PROCESSOR * processors // max(tiles, 1))
        steps = max(1, -(-tokens // tile.tokens))
        most = max(1, (2**31 - 1) // stride // tile.tokens)
        return min(-(-steps // min(shares, steps)), most) * tile.tokens

    def _settings(self, kernel: Kernel, u: Tensor, n: Tensor, options: Relu24Options) -> tuple[Tile, dict[str, Any]]:
        """The tile of a kernel for `u [n, r_in]` and `n [f, r_out]`, and the constants it is compiled for."""
        r, soft = max(u.shape[1], n.shape[1]), method_of(options) == 2
        measured = _measured(kernel, u.device, u.dtype, u.shape[1], n.shape[1], soft)
        tile = self.tile or measured or choose(chip_of(u.device), kernel, u.dtype, r, soft)
        assert tile is not None, "`misfit` refuses widths without a tile"
        words = packs(u.device, u.dtype, method_of(options))
        return tile, constants(tile, u.shape[1], n.shape[1], precision_of(u.dtype), method_of(options), words)


def packs(device: torch.device, dtype: torch.dtype, method: int) -> bool:
    """Whether kernels prune in packed words (triton/packed.py): bf16, sm_90 and later, not the soft threshold."""
    if device.type != "cuda" or dtype != torch.bfloat16 or method == 2:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def constants(tile: Tile, r_in: int, r_out: int, precision: str, method: int, words: bool) -> dict[str, Any]:
    """Compile-time arguments of a fused kernel, with `num_warps` and `num_stages`."""
    return {
        "R_IN": r_in,
        "R_OUT": r_out,
        "METHOD": method,
        "BM": tile.tokens,
        "BF": tile.features,
        "BI": tile.columns(r_in),
        "BO": tile.columns(r_out),
        "GAP": tile.gap,
        "P": precision,
        "PACKED": words,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def slower(widths: Widths, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `auto` leaves these widths to `chunked`, or None."""
    if max(widths.r_in, widths.r_out) <= FASTEST_UP_TO:
        return None
    return f"above widths of {FASTEST_UP_TO} its sums leave too few registers; chunked is faster"


register(
    Implementation.of_passes("triton", "fused", TritonFused(), obstacle, priority=PRIORITY, fits=misfit, yields=slower)
)
