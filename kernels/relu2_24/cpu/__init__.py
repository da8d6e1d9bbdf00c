"""`ffn_core` on CPU in C++: fused and compressed memory, fp32 and bf16, in tiles of tokens × features.

z of a tile is a small matrix product. Relu², mask, square and gradient are computed in one pass over it, in AVX-512,
AVX2 or plain C++, chosen at run time, and the result is multiplied while it is in cache. Only the kept tensors of
`compressed` are written f wide. Each thread works on its own tiles, so threads wait for each other twice in a pass.

- tile.h: interface of the passes over a tile; rows.h: their code over `simd_*.h`; avx512.cpp, avx2.cpp, scalar.cpp:
  compiled for each instruction set.
- products_f32.cpp: the passes around fp32 products (ATen), also for bf16 on machines without bf16 matrix instructions.
- products_bf16.cpp: the passes around bf16 products (oneDNN's brgemm) with fp32 sums.
- few_tokens.cpp: products of a few tokens, for generating text (../few_tokens.py).
- core.cpp: the operators.

The machine's C++ compiler builds it once into `elas.extensions.extensions_dir()`, in about half a minute. Without a
compiler `auto` chooses plain PyTorch, with a warning (registry.py).
"""

import functools
import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from elas import extensions
from elas.errors import UserError
from elas.kernels.relu2_24 import reference
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.passes import Gradients, Kept, Needs, Operands, Passes
from elas.kernels.relu2_24.plain.compressed import TorchCompressed
from elas.kernels.relu2_24.plain.fused import TorchFused
from elas.kernels.relu2_24.registry import Implementation, register

logger = logging.getLogger("elas.kernels")

FLAGS = ["-O3", "-fopenmp", "-Wno-maybe-uninitialized"]  # the header of at::parallel_for requires OpenMP
WHAT = "the CPU kernel of the sparse FFN"


def _sources() -> list[Path]:
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h"))


def _name() -> str:
    """A name that contains a digest of sources and flags, so that a build of other sources is never loaded."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    return f"elas_relu2_24_cpu_{digest.hexdigest()[:12]}"


def prebuild() -> float:
    """Build the extension unless it exists; prints a message only if it builds.

    Returns:
        Seconds spent building; 0 if it existed.

    Raises:
        UserError: no compiler, a failed build, or another process's build did not end in time.
    """
    name = _name()

    def build(folder: Path, timeout_s: float) -> None:
        extensions.compiler()
        sources = [str(source) for source in _sources() if source.suffix == ".cpp"]
        code = (
            "from torch.utils.cpp_extension import load\n"
            f"load({name!r}, {sources!r}, extra_cflags={FLAGS!r}, extra_ldflags=['-fopenmp'], "
            f"build_directory={str(folder)!r}, is_python_module=False)\n"
        )
        extensions.run_build(code, folder, timeout_s, WHAT)

    return extensions.build_once(name, build, what=WHAT)


@functools.cache
def operators():
    """`torch.ops.elas_relu2_24_cpu`; builds the extension if necessary.

    Raises:
        UserError: see `prebuild`.
    """
    name = _name()
    prebuild()
    torch.ops.load_library(str(extensions.library(name)))
    ops = torch.ops.elas_relu2_24_cpu
    logger.debug("relu2_24 on cpu: %s", ops.description())
    return ops


@functools.cache
def build_obstacle() -> str | None:
    """Why the operators cannot be built or loaded on this machine, or None; cached in the process."""
    try:
        operators()
    except (UserError, OSError) as error:
        return str(error)
    return None


def available(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the extension does not run there; None if it does, and then it is built."""
    if device.type != "cpu":
        return "it runs on CPUs"
    if dtype not in (torch.float32, torch.bfloat16):
        return "it supports float32 and bfloat16"
    return build_obstacle()


def mode_of(options: Relu24Options) -> int:
    """`enum Mode` of tile.h."""
    if not options.sparse:
        return 0
    return 1 + 2 * (options.method == "soft_threshold") + (options.gradient == "ste")


class CpuPasses:
    """`Passes` in C++.

    Args:
        keeps: True for `compressed` memory, False for `fused`.
        plain: computes operands without elements.
    """

    def __init__(self, keeps: bool, plain: Passes):
        self.keeps, self.plain = keeps, plain

    def forward(self, operands: Operands, options: Relu24Options, keep: bool) -> tuple[Tensor, Kept]:
        """See `Passes`."""
        u, m_up, n_down = operands
        if not (u.numel() and m_up.numel() and n_down.numel()):
            return self.plain.forward(operands, options, keep)
        if not keep and u.shape[0] < 32:  # text generation: nothing to save, and one product by all threads is faster
            return reference.ffn_core(u, m_up, n_down, options), ()
        v, *kept = operators().forward(u, m_up, n_down, mode_of(options), options.scale, keep and self.keeps)
        return v, tuple(kept)

    def backward(self, operands: Operands, kept: Kept, dv: Tensor, options: Relu24Options, needs: Needs) -> Gradients:
        """See `Passes`."""
        u, m_up, n_down = operands
        if not (u.numel() and m_up.numel() and n_down.numel()):
            return self.plain.backward(operands, kept, dv, options, needs)
        grads = operators().backward(u, m_up, n_down, list(kept), dv, mode_of(options), options.scale, *needs)
        du, dm_up, dn_down = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return du, dm_up, dn_down


register(Implementation.of_passes("cpu", "fused", CpuPasses(False, TorchFused()), available, priority=10))
register(Implementation.of_passes("cpu", "compressed", CpuPasses(True, TorchCompressed()), available, priority=10))
