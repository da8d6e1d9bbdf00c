"""The feed-forward layer: one class for full-rank and low-rank, gated and squared-ReLU, dense and 2:4.

Legend: s sequence, b batch, h hidden, f d_ff, r rank (h at full rank), t tensor-parallel ranks.

    squared ReLU   u = bottleneck(x) [s, b, r];  v = prune(relu²(u · M_upᵀ)) · N_downᵀ [s, b, r];  y = finish(v)
    SwiGLU         gate, up [s, b, f/t];  y = down(silu(gate) · up)

With low rank, M_up is `linear_fc1.factor_out [f/t, r]` and N_down `linear_fc2.factor_in [r, f/t]`: both ends of the
core are r wide, and what it keeps of the f-wide activation is the kernel's business (`elas.kernels.relu2_24`). At full
rank the same core runs on the weights themselves, u = x and v = the partial output.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import build_module

from elas.kernels.relu2_24 import ffn_core
from elas.model.activation import SparseSwitch
from elas.model.transformer_config import ElasTransformerConfig


class ElasFFN(SparseSwitch):
    """Megatron's `MLP` in shape and names (`linear_fc1`, `linear_fc2`), with the fused squared-ReLU core.

    Args:
        config: widths, rank, activation, sparsity.
        submodules: the two linears, from `ElasSpecProvider`.
        tp_group: tensor-parallel group; None takes Megatron's.
    """

    submodules: MLPSubmodules  # set by `ffn_class`

    def __init__(self, config: ElasTransformerConfig, submodules: MLPSubmodules | None = None, tp_group=None):
        super().__init__(config)
        submodules = submodules or self.submodules
        self.config = config
        self.gated = config.ffn_activation == "swiglu"
        if self.gated:
            self.can_be_sparse = self.sparse = False
        shared = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=True, is_expert=False)
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            config.hidden_size,
            config.ffn_hidden_size * (2 if self.gated else 1),
            gather_output=False,
            tp_comm_buffer_name="fc1",
            tp_group=tp_group,
            stride=2 if self.gated else 1,
            **shared,
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            config.ffn_hidden_size,
            config.hidden_size,
            input_is_parallel=True,
            tp_comm_buffer_name="fc2",
            tp_group=tp_group,
            **shared,
        )
        self.full_rank = isinstance(self.linear_fc1, ColumnParallelLinear)

    def forward(self, x: torch.Tensor, **_unused) -> tuple[torch.Tensor, None]:
        """`x [s, b, h]` (`[s/t, b, h]` with sequence parallelism) to the same shape, and no bias."""
        if self.gated:
            if self.full_rank:
                gate, up = self.linear_fc1(x)[0].chunk(2, dim=-1)
            else:
                gate, up = self.linear_fc1.expand(self.linear_fc1.bottleneck(x))
            return self.linear_fc2(F.silu(gate) * up)
        u, m_up, n_down = self._core_operands(x)
        self.observer.look(x, self._preactivation, self.sparse)
        v = ffn_core(u, m_up, n_down, self.options, implementation=self.config.sparsity.implementation)
        return (self._finish_full_rank(v) if self.full_rank else self.linear_fc2.finish(v)), None

    def _preactivation(self, x: torch.Tensor) -> torch.Tensor:
        """z `[n, f/t]` of some of this rank's tokens `x [n, h]`, without communication."""
        if self.full_rank:
            return F.linear(x, self.linear_fc1.weight)
        return F.linear(F.linear(x, self.linear_fc1.factor_in), self.linear_fc1.factor_out)

    def _core_operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.full_rank:
            return self.linear_fc1.bottleneck(x), self.linear_fc1.factor_out, self.linear_fc2.factor_in
        group = self.linear_fc1.tp_group
        if self.config.sequence_parallel:
            u = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
        else:
            u = copy_to_tensor_model_parallel_region(x, group=group)
        return u, self.linear_fc1.weight, self.linear_fc2.weight

    def _finish_full_rank(self, v: torch.Tensor) -> torch.Tensor:
        group = self.linear_fc1.tp_group
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(v, group=group)
        return reduce_from_tensor_model_parallel_region(v, group=group)


def ffn_class(submodules: MLPSubmodules) -> type[ElasFFN]:
    """`ElasFFN` bound to its linears: Megatron's `TransformerLayer` warns about any other spec than its own MLP's."""
    return type("ElasFFN", (ElasFFN,), {"submodules": submodules})
