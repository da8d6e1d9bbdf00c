"""The layers for plain PyTorch, DeepSpeed and Hugging Face models: no process groups, no Megatron-core.

    from elas.nn import LowRankFFN, LowRankLinear

    ffn = LowRankFFN(hidden_size=768, ffn_hidden_size=3072, rank=192)   # squared ReLU with 2:4; saves nothing d_ff wide
    out = LowRankLinear(768, 768, rank=192)

They initialise themselves, take `device` and `dtype` like torch's layers, and have the parameter names of the layers
for Megatron-core, so that weights can be copied between them. 2:4 is on from the first step; for dense steps before it
pass `dense_steps=N` and call `count_steps(model, optimizer)` once.

- linear.py: `LowRankLinear`, and `SVD` of an `nn.Linear`.
- ffn.py: `LowRankFFN` and, with full-rank linears, `SparseFFN`.
- loro.py: `LORO`, a torch optimizer; observing.py: `observe`, statistics of 2:4.
- parallel.py: tensor parallelism with torch's DTensor (not imported here, since that takes a second).
- settings.py: checks of the layers' arguments.
"""

from elas.kernels.relu2_24 import Relu24Options
from elas.model.activation import set_sparse, set_step
from elas.model.counting import count_steps
from elas.nn.ffn import LowRankFFN, SparseFFN
from elas.nn.linear import LowRankLinear
from elas.nn.loro import LORO
from elas.nn.observing import observe

__all__ = [
    "LORO",
    "LowRankFFN",
    "LowRankLinear",
    "Relu24Options",
    "SparseFFN",
    "count_steps",
    "observe",
    "set_sparse",
    "set_step",
]
