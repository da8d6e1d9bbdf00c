"""What the tests of relu2_24 compare against: brute force over groups, formulas in fp64, bytes saved.

Shapes: `f` features, `r_in`, `r_out` widths of the two ends of the core.
"""

import itertools
import math

import torch

from elas.kernels.relu2_24 import Relu24Options

METHODS = ("magnitude", "soft_threshold")
GRADIENTS = ("masked", "ste")
CASES = [Relu24Options(sparse=False)] + [
    Relu24Options(method=method, gradient=gradient, scale=scale)
    for method, gradient, scale in (*itertools.product(METHODS, GRADIENTS, (1.0,)), ("soft_threshold", "masked", 1.3))
]
"""Every way to prune, once; `ffn_memory` is replaced by the tests."""


def case_name(options):
    """Test id of an entry of CASES."""
    return f"{options.method}-{options.gradient}-{options.scale}" if options.sparse else "dense"


def order(group):
    """Indices of four numbers by value, descending; NaN as +inf; ties to the lower index."""
    return sorted(range(4), key=lambda i: (-(math.inf if math.isnan(group[i]) else group[i]), i))


def brute_masks(x):
    """Masks of the two largest and of the third largest of every four of `x [n, f]`, group by group."""
    keep, third = torch.zeros(x.shape, dtype=torch.bool), torch.zeros(x.shape, dtype=torch.bool)
    for row, values in enumerate(x.tolist()):
        for start in range(0, len(values), 4):
            first, second, last, _ = order(values[start : start + 4])
            keep[row, start + first] = keep[row, start + second] = True
            third[row, start + last] = True
    return keep, third


def fp64_step(z, ds, options):
    """`(s, dz)` in fp64 by the written formulas, from z and ds `[n, f]` of any dtype."""
    rho, ds = z.detach().double().clamp_min(0), ds.double()
    if not options.sparse:
        return rho**2, 2 * rho * ds
    keep, third = brute_masks(rho)
    soft = options.method == "soft_threshold"
    scale = options.scale if soft else 1.0
    groups = (-1, z.shape[-1] // 4, 4)
    t = (rho * third * soft).view(groups).sum(-1, keepdim=True)
    excess = (rho.view(groups) - t).view(z.shape) * keep
    s = scale * excess**2
    if options.gradient == "ste":
        return s, 2 * rho * scale * ds
    d = 2 * scale * excess * ds
    at_third = d.view(groups).sum(-1, keepdim=True).expand(-1, -1, 4).reshape(z.shape) * third * (rho > 0) * soft
    return s, d - at_third


def fp64_core(u, m_up, n_down, dv, options):
    """v and the three gradients of the core in fp64, but with z rounded as the tested dtype rounds it.

    A z rounded otherwise would rank near-ties otherwise, which is no error of the operation.
    """
    z = torch.nn.functional.linear(u, m_up).detach().reshape(-1, m_up.shape[0])
    u2, dv2 = (x.detach().double().reshape(-1, x.shape[-1]) for x in (u, dv))
    s, dz = fp64_step(z, dv2 @ n_down.detach().double(), options)
    v = (s @ n_down.detach().double().T).view(*u.shape[:-1], -1)
    du = (dz @ m_up.detach().double()).view(u.shape)
    return {"v": v, "du": du, "dm_up": dz.T @ u2, "dn_down": dv2.T @ s}


def rms_ratio(got, want):
    """RMS of the error over RMS of the truth."""
    want = want.double()
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def spread(n, f, seed, dtype=torch.float64, step=0.05):
    """`z [n, f]` with all values at least a step apart and none nearer than half a step to 0: no kinks, no ties."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randperm(n * f, generator=generator).to(dtype)
    return ((ranks - n * f // 2 + 0.5) * step).view(n, f)


def saved_bytes(run, inputs):
    """Bytes of the storages autograd keeps from `run()`, each once, those of the inputs not counted."""
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run()
    known = {x.untyped_storage().data_ptr() for x in inputs}
    assert out.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in known)


def exact_inputs(n, r_in, f, r_out, dtype, seed=0):
    """u, m_up, n_down (leaves that want gradients) and dv, with u and m_up on a grid of eighths.

    Their products are sums of 64ths well below 2²⁴ of them, so z is the same to the last bit in whatever order it is
    summed, and ties abound: no implementation can be excused for ranking otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    u, m_up = (torch.randint(-8, 9, shape, generator=generator).div(8).to(dtype) for shape in ((n, r_in), (f, r_in)))
    n_down, dv = (torch.randn(shape, generator=generator).to(dtype) for shape in ((r_out, f), (n, r_out)))
    return u.requires_grad_(), m_up.requires_grad_(), n_down.requires_grad_(), dv
