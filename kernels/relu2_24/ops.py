"""The public calls: check the inputs once, choose an implementation, run it.

Autocast: as with torch's own `linear`, operands are cast to autocast's dtype (fp64 ones are not) and the result has it;
what happens inside is ours to say, so autocast is off there, in the backward pass too (`passes.py`).

Shapes: `f` features, `r_in`, `r_out` widths of the two ends of the core.
"""

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24 import compiled, reference, registry
from elas.kernels.relu2_24.autocast import autocast_dtype, autocast_off
from elas.kernels.relu2_24.options import Relu24Options, check_activation, check_core
from elas.kernels.relu2_24.passes import transformed
from elas.kernels.relu2_24.plain import compressed
from elas.kernels.relu2_24.sharding import is_sharded


def relu2_24(z: Tensor, options: Relu24Options) -> Tensor:
    """`s = prune(relu(z)²)` element by element over groups of four consecutive features.

    Args:
        z: `[..., f]`, fp64, fp32 or bf16, any strides; f % 4 == 0 when `options.sparse`. Not modified.
        options: `ffn_memory` says what is kept for the backward pass; the activation alone has no products to fuse
            with, so `fused` keeps what `compressed` does.

    Returns:
        s: shape and dtype of z, the same values whatever `ffn_memory`.

    Raises:
        UserError: fp16 or another dtype that is not taken.
        ConfigError: f does not divide by 4, or the split backward is asked for, which needs the products.

    Source: arXiv 2605.03667; gradients as `Relu24Options` defines them.
    """
    if options.backward == "split":
        why = "the activation alone has no weight gradients"
        raise ConfigError("backward", "split", why, "use ffn_core, or backward=dense")
    check_activation(z.dtype, z.shape[-1], options)
    with autocast_off(z.device):  # on CUDA it squares in fp32, and the result would have another dtype
        return (reference if options.ffn_memory == "eager" else compressed).relu2_24(z, options)


def ffn_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, implementation: str = "auto") -> Tensor:
    """`v = prune(relu²(u m_upᵀ)) n_downᵀ`, the FFN between its two inner widths.

    Args:
        u: `[..., r_in]`, fp64, fp32 or bf16, any strides, any number of tokens.
        m_up: `[f, r_in]`, factor_out of the up projection (full rank: its weight), same dtype.
        n_down: `[r_out, f]`, factor_in of the down projection (full rank: its weight), same dtype.
        options: pruning, gradient and memory; see `Relu24Options`.
        implementation: name of a registered implementation, or `auto`; see `registry.select`.

    Returns:
        v: `[..., r_out]` in the dtype of u, under autocast in autocast's. Under tensor parallelism f is this rank's
        share and v a partial sum.

    Raises:
        UserError: shapes or dtypes that do not fit; fp16, also of autocast.
        ConfigError: f does not divide by 4, or the memory mode or implementation is not available.
    """
    dtype = autocast_dtype(u.device)
    if dtype is None:
        return _ffn_core(u, m_up, n_down, options, implementation)
    u, m_up, n_down = (x if x.dtype == torch.float64 else x.to(dtype) for x in (u, m_up, n_down))
    with autocast_off(u.device):
        return _ffn_core(u, m_up, n_down, options, implementation)


def _ffn_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, implementation: str) -> Tensor:
    check_core(u, m_up, n_down, options)
    tracing, under_func = torch.compiler.is_compiling(), transformed()
    if tracing or under_func or is_sharded(u, m_up, n_down):
        if options.ffn_memory != "eager" or options.backward == "split":
            if tracing and under_func:
                # Eager there; with fullgraph this is an error. Dynamo shows literals only.
                torch._dynamo.graph_break(
                    msg="torch.func transforms of ffn_core under torch.compile need ffn_memory eager, gradient masked"
                )
            return compiled.ffn_core(u, m_up, n_down, options, implementation, under_func=under_func)
        if implementation in ("auto", "reference"):
            return reference.ffn_core(u, m_up, n_down, options)
    widths = registry.Widths.of(m_up, n_down)
    return registry.select(options, u.device, u.dtype, implementation, widths).core(u, m_up, n_down, options)
