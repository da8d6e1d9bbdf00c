"""The core at full sizes on a GPU: inputs, formulas in fp64 for tensors of millions, and runs of one implementation.

Shapes: `n` tokens, `f` features, `r_in`, `r_out` widths of the two ends of the core.
"""

import dataclasses

import torch
from support.relu2_24_oracle import exact_inputs

from elas.kernels.relu2_24 import Relu24Options, ffn_core

NAMES = ("v", "du", "dm_up", "dn_down")
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 8e-3}
"""RMS relative to fp64: products of fp32 are TF32 (2⁻¹¹ an operand); in bf16 s, dz and the results are rounded."""


def leaves(n, r_in, f, r_out, dtype, device, seed=0):
    """`exact_inputs` on the device: sums of products of u and m_up are exact, also in TF32, and ties abound."""
    *operands, dv = exact_inputs(n, r_in, f, r_out, dtype, seed)
    return *(x.detach().to(device).requires_grad_() for x in operands), dv.to(device)


def run(u, m_up, n_down, dv, options, implementation):
    """v and every gradient by name."""
    v = ffn_core(u, m_up, n_down, options, implementation)
    return dict(zip(NAMES, (v.detach(), *torch.autograd.grad(v, (u, m_up, n_down), dv)), strict=True))


def truth(u, m_up, n_down, dv, options):
    """v and every gradient in fp64, with z exact and rounded to the operands' dtype."""
    u64, m64, n64, dv64 = (x.detach().double() for x in (u, m_up, n_down, dv))
    rho = (u64 @ m64.T).to(u.dtype).double().clamp_min(0)
    s, slope = activation(rho, options)
    ds = dv64 @ n64
    dz = slope(ds)
    return {"v": s @ n64.T, "du": dz @ m64, "dm_up": dz.T @ u64, "dn_down": dv64.T @ s}


def activation(rho, options):
    """s of `rho [n, f]`, and the function from ds to dz; ranks by a stable sort, so ties go to the lower index."""
    if not options.sparse:
        return rho**2, lambda ds: 2 * rho * ds
    groups = rho.unflatten(-1, (-1, 4))
    places = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups).scatter_(-1, places[..., :2], 1.0)
    third = torch.zeros_like(groups).scatter_(-1, places[..., 2:3], 1.0)
    soft = options.method == "soft_threshold"
    scale = options.scale if soft else 1.0
    excess = (groups - soft * (groups * third).sum(-1, keepdim=True)) * keep

    def slope(ds):
        if options.gradient == "ste":
            return 2 * rho * scale * ds
        d = 2 * scale * excess * ds.unflatten(-1, (-1, 4))
        return (d - soft * d.sum(-1, keepdim=True) * third * (groups > 0)).flatten(-2)

    return (scale * excess**2).flatten(-2), slope


def of_memory(options, memory):
    """The options with another memory mode."""
    return dataclasses.replace(options, ffn_memory=memory)


MASKED = Relu24Options()
