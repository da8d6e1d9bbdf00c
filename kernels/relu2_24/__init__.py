"""Squared ReLU with 2:4 pruning: `s = prune(relu(z)²)`, alone and as the core `v = prune(relu²(u m_upᵀ)) n_downᵀ`.

- options.py: `Relu24Options`, what is pruned, how gradients go through it, what the backward pass keeps.
- reference.py: the operation in plain autograd, and statistics of its input.
- pack.py: masks of 2:4 groups; two kept values of four with their positions, packed and unpacked.
- core.py: what an implementation of `ffn_core` is, a forward and a backward pass, and the autograd around them.
- plain/compressed.py: the operation keeping only the packed form for its backward pass (`compressed`).
- fused.py: the core in chunks, keeping nothing f wide (`fused`).
- split.py: weight gradients from an activation pruned along tokens too, emulated (`sparsity.backward: split`).
- cpu/: fused and compressed in C++.
- registry.py: which implementation of `ffn_core` runs; compiled.py: `ffn_core` under torch.compile
  and torch.func; sharding.py: with DTensors.
- autocast.py: what autocast means to the core.
- ops.py: the public calls, which check their inputs and choose.
"""

from elas.kernels.relu2_24 import registrations  # noqa: F401  (fills the registry)
from elas.kernels.relu2_24.ops import ffn_core, relu2_24
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.reference import activation_stats, fit_scale
from elas.kernels.relu2_24.registry import Implementation, implementations, register, select

__all__ = [
    "Implementation",
    "Relu24Options",
    "activation_stats",
    "ffn_core",
    "fit_scale",
    "implementations",
    "register",
    "relu2_24",
    "select",
]
