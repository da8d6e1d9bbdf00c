"""Squared ReLU with 2:4 pruning: `s = prune(relu(z)²)`, alone and as the core `v = prune(relu²(u m_upᵀ)) n_downᵀ`.

The interface:

- ops.py: the public functions; they check their inputs and choose an implementation.
- options.py: `Relu24Options`: what is pruned, how gradients pass, what the backward pass keeps.
- registry.py: chooses the implementation of `ffn_core`; registrations.py: registers those of this package.
- passes.py: the protocol of an implementation of `ffn_core` (a forward and a backward pass), and autograd around it.
- compiled.py: `ffn_core` under torch.compile and torch.func; sharding.py: with DTensors; autocast.py: under autocast.

The implementations:

- reference.py: plain autograd, which defines the result; pack.py: 2:4 masks, and packing of the kept values.
- plain/: PyTorch's own operations; cpu/: C++; triton/: Triton; semi_structured.py: cuSPARSELt and CUTLASS.
"""

from elas.kernels.relu2_24 import registrations  # noqa: F401  (fills the registry)
from elas.kernels.relu2_24.ops import ffn_core, relu2_24
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.reference import activation_stats
from elas.kernels.relu2_24.registry import Implementation, implementations, register, select

__all__ = [
    "Implementation",
    "Relu24Options",
    "activation_stats",
    "ffn_core",
    "implementations",
    "register",
    "relu2_24",
    "select",
]
