"""Checks implementations of `ffn_core` against its formulas in fp64, on inputs whose z is exact.

Legend: n tokens, f features, r_in and r_out the widths of u and v.

u and m_up are multiples of 1/8, so z = u·m_upᵀ is the same to the last bit in any order of summation, also in TF32, and
equal values abound: every implementation must keep the same two of four. Everything after z is compared by the RMS of
the error, relative to the RMS of the true value, for v and the three gradients.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from elas.bench.measure import rms_error
from elas.config.pruning import FfnMemory
from elas.kernels.relu2_24 import Relu24Options, ffn_core, implementations, registry

NAMES = ("v", "du", "dm_up", "dn_down")
BOUNDS = {"float32": 2e-3, "bfloat16": 8e-3}
"""Bounds of the error: fp32 products may be TF32 (2⁻¹¹ per operand); in bf16 s, dz and the results are rounded."""
CPU_FLOAT32 = 3e-6
"""The bound of fp32 on a CPU, which does not use TF32."""
METHODS = {
    "dense": Relu24Options(sparse=False),
    "ste": Relu24Options(gradient="ste"),
    "soft": Relu24Options(method="soft_threshold"),
    "soft-ste": Relu24Options(method="soft_threshold", gradient="ste"),
    "soft-1.3": Relu24Options(method="soft_threshold", scale=1.3),
}
"""The other ways to prune than magnitude with its exact gradient: none, straight-through, with a soft threshold."""


class Operands(NamedTuple):
    """Inputs of a core, which require gradients, and the upstream gradient.

    `u [n, r_in]`, `m_up [f, r_in]`, `n_down [r_out, f]`, `dv [n, r_out]`.
    """

    u: Tensor
    m_up: Tensor
    n_down: Tensor
    dv: Tensor


def operands(
    n: int, r_in: int, f: int, r_out: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Operands:
    """Exact inputs, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    u, m_up = (torch.randint(-8, 9, shape, generator=generator).div(8) for shape in ((n, r_in), (f, r_in)))
    n_down, dv = (torch.randn(shape, generator=generator) for shape in ((r_out, f), (n, r_out)))
    u, m_up, n_down, dv = (x.to(device, dtype) for x in (u, m_up, n_down, dv))
    return Operands(u.requires_grad_(), m_up.requires_grad_(), n_down.requires_grad_(), dv)


def computed(inputs: Operands, options: Relu24Options, implementation: str) -> dict[str, Tensor]:
    """v and all gradients by name, from one implementation of `options.ffn_memory`."""
    u, m_up, n_down, dv = inputs
    v = ffn_core(u, m_up, n_down, options, implementation)
    return dict(zip(NAMES, (v.detach(), *torch.autograd.grad(v, (u, m_up, n_down), dv))))


def truth(inputs: Operands, options: Relu24Options) -> dict[str, Tensor]:
    """v and all gradients in fp64, with z rounded to the operands' dtype."""
    u, m_up, n_down, dv = (x.detach().double() for x in inputs)
    rho = (u @ m_up.T).to(inputs.u.dtype).double().clamp_min(0)
    s, slope = _activation(rho, options)
    dz = slope(dv @ n_down)
    return dict(zip(NAMES, (s @ n_down.T, dz @ m_up, dz.T @ u, dv.T @ s)))


def _activation(rho: Tensor, options: Relu24Options) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """s of `rho [n, f]`, and the function from ds to dz; a stable sort, since ties go to the lower index."""
    if not options.sparse:
        return rho**2, lambda ds: 2 * rho * ds
    groups = rho.view(rho.shape[0], -1, 4)
    places = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups).scatter_(-1, places[..., :2], 1.0)
    third = torch.zeros_like(groups).scatter_(-1, places[..., 2:3], 1.0)
    soft = options.method == "soft_threshold"
    scale = options.scale if soft else 1.0
    excess = (groups - soft * (groups * third).sum(-1, keepdim=True)) * keep

    def slope(ds: Tensor) -> Tensor:
        if options.gradient == "ste":
            return 2 * rho * scale * ds
        d = 2 * scale * excess * ds.view_as(groups)
        return (d - soft * d.sum(-1, keepdim=True) * third * (groups > 0)).flatten(1)

    return (scale * excess**2).flatten(1), slope


def bound(dtype: str, device: torch.device) -> float:
    """The largest error that is right."""
    return CPU_FLOAT32 if (dtype, device.type) == ("float32", "cpu") else BOUNDS[dtype]


@dataclasses.dataclass(frozen=True)
class Case:
    """One check of one implementation.

    Args:
        one: the implementation.
        dtype: `float32` or `bfloat16`.
        rank: r_in and r_out.
        options: with the implementation's `ffn_memory`.
        method: key of `METHODS`; empty for magnitude with its exact gradient.
    """

    one: registry.Implementation
    dtype: str
    rank: int
    options: Relu24Options
    method: str = ""

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the tensors that the formulas give; `split` has other weight gradients by design."""
        return NAMES[:2] if self.options.backward == "split" else NAMES


def registered() -> list[registry.Implementation]:
    """All implementations, by memory mode and priority."""
    return [one for memory in get_args(FfnMemory) for one in implementations(memory)]


def cases(one: registry.Implementation, dtype: str, ranks: tuple[int, ...], methods_rank: int) -> Iterator[Case]:
    """Every rank with magnitude pruning, and at one rank every other method that the implementation supports."""
    main = dataclasses.replace(Relu24Options(), ffn_memory=one.ffn_memory)
    if one.supports(main) is not None and one.ffn_memory == "eager":
        split = dataclasses.replace(main, backward="split")
        main = split if one.supports(split) is None else main
    yield from (Case(one, dtype, rank, main) for rank in ranks)
    for name, options in METHODS.items():
        of_memory = dataclasses.replace(options, ffn_memory=one.ffn_memory)
        if one.supports(of_memory) is None:
            yield Case(one, dtype, methods_rank, of_memory, name)


class Checker:
    """Compares cases with fp64; keeps the true values, which cases of one shape share.

    Args:
        device: of the tensors.
        n: tokens, a multiple of 64.
        f: features, a multiple of 64.
    """

    def __init__(self, device: torch.device, n: int, f: int):
        self.device, self._n, self._f = device, n, f
        self._known: dict[tuple, tuple[Operands, dict[str, Tensor]]] = {}

    def obstacle(self, case: Case) -> str | None:
        """Why the implementation refuses the case, or None."""
        widths = registry.Widths(case.rank, self._f, case.rank)
        return registry.obstacle(case.one, case.options, self.device, getattr(torch, case.dtype), widths)

    def expected(self, case: Case) -> tuple[Operands, dict[str, Tensor]]:
        """The operands of a case, and its true values."""
        key = case.dtype, case.rank, case.method
        if key not in self._known:
            rank, dtype = case.rank, getattr(torch, case.dtype)
            inputs = operands(self._n, rank, self._f, rank, dtype, self.device)
            self._known[key] = inputs, truth(inputs, case.options)
        return self._known[key]

    def errors(self, case: Case) -> dict[str, float]:
        """The relative RMS error by name; infinite for a tensor of another shape or dtype, or that is not finite."""
        inputs, want = self.expected(case)
        got, dtype = computed(inputs, case.options, case.one.name), inputs.u.dtype
        return {
            name: rms_error(got[name], want[name]) if got[name].dtype == dtype else float("inf")
            for name in case.compared
        }
