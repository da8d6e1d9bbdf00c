"""The public functions: check the inputs, choose an implementation, run it.

Autocast: as in torch's `linear`, operands are cast to autocast's dtype (fp64 ones are not), which is the dtype of the
result. Inside, and in the backward pass (passes.py), autocast is off: implementations control their own dtypes.

Shapes: `f` features, `r_in` and `r_out` input and output width of the core.
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
    """`s = prune(relu(z)²)`, pruned in groups of four consecutive features.

    Args:
        z: `[..., f]`, fp64, fp32 or bf16, any strides; f % 4 == 0 if `options.sparse`. Not modified.
        options: `ffn_memory` decides what is kept for the backward pass. The activation alone has no products to fuse
            with, so `fused` keeps the same as `compressed`.

    Returns:
        s: shape and dtype of z, the same values for every `ffn_memory`.

    Raises:
        UserError: an unsupported dtype, such as fp16.
        ConfigError: f is not a multiple of 4, or `options.backward` is split, which requires the products.

    Source: arXiv 2605.03667; `Relu24Options` defines the gradients.
    """
    if options.backward == "split":
        why = "the activation alone has no weight gradients"
        raise ConfigError("backward", "split", why, "use ffn_core, or backward=dense")
    check_activation(z.dtype, z.shape[-1], options)
    with autocast_off(z.device):  # on CUDA it squares in fp32, and the result would have another dtype
        return (reference if options.ffn_memory == "eager" else compressed).relu2_24(z, options)


def ffn_core(u: Tensor, m_up: Tensor, n_down: Tensor, options: Relu24Options, implementation: str = "auto") -> Tensor:
    """`v = prune(relu²(u m_upᵀ)) n_downᵀ`, the core of the FFN.

    Args:
        u: `[..., r_in]`, fp64, fp32 or bf16, any strides, any number of tokens.
        m_up: `[f, r_in]`, factor_out of the up projection (full rank: its weight), same dtype.
        n_down: `[r_out, f]`, factor_in of the down projection (full rank: its weight), same dtype.
        options: pruning, gradient and memory; see `Relu24Options`.
        implementation: name of a registered implementation, or `auto`; see `registry.select`.

    Returns:
        v: `[..., r_out]` in the dtype of u, under autocast in autocast's. Under tensor parallelism f is this rank's
        share, and v this rank's term of a sum over ranks.

    Raises:
        UserError: shapes or dtypes that do not match; fp16, also by autocast.
        ConfigError: f is not a multiple of 4, or the memory mode or implementation is not available for this call.
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
                # Falls back to eager; an error with fullgraph. Dynamo shows the message only if it is a literal.
                torch._dynamo.graph_break(
                    msg="torch.func transforms of ffn_core under torch.compile need ffn_memory eager, gradient masked"
                )
            return compiled.ffn_core(u, m_up, n_down, options, implementation, under_func=under_func)
        if implementation in ("auto", "reference"):
            return reference.ffn_core(u, m_up, n_down, options)
    widths = registry.Widths.of(m_up, n_down)
    return registry.select(options, u.device, u.dtype, implementation, widths).core(u, m_up, n_down, options)
