"""Megatron-core's full-rank linears, which can pass their weight to the squared-ReLU core (`elas.model.core_call`).

Legend: s sequence, b batch, h hidden, f d_ff, t tensor-parallel ranks.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from elas.model.core_call import Core, check_plain_call, with_bias


class FullRankColumnParallelLinear(ColumnParallelLinear):
    """Megatron's `ColumnParallelLinear`; with `core`, calls it instead of computing the product."""

    def __init__(self, *args, tp_comm_buffer_name: str | None = None, **kwargs):
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.place = tp_comm_buffer_name

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        core: Core | None = None,
    ):
        """Megatron's forward, or the result of `core(u, weight)`.

        Args:
            input_: `[s, b, h]` (`[s/t, b, h]` with sequence parallelism).
            weight: Megatron's: a weight of another module, for tied embeddings.
            runtime_gather_output: Megatron's.
            core: called with the whole input `u [s, b, h]` and `weight [f/t, h]` (with a bias both are 8 wider).
        """
        if core is None:
            check_plain_call(self.place, self.config)
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            u = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            u = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        assert self.weight is not None  # Megatron leaves it out for tied embeddings only
        return core(*with_bias(u, self.weight, self.bias))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's outputs `[n, f/t]` of tokens `x [n, h]`, without communication; only during a call."""
        assert self.weight is not None
        return torch.nn.functional.linear(x, self.weight, self.bias)


class FullRankRowParallelLinear(RowParallelLinear):
    """Megatron's `RowParallelLinear`; with `core`, calls it instead of computing the product."""

    def forward(self, input_: torch.Tensor, *, core: Core | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron's forward, with `core(input_, weight)` in place of `input_·weightᵀ`.

        Args:
            input_: `[s, b, f/t]`, or the input of `core`.
            core: called with `input_` and `weight [h, f/t]`; returns partial sums `[s, b, h]`.

        Returns:
            Output `[s, b, h]` (`[s/t, b, h]` with sequence parallelism), and the bias, if the caller is to add it.
        """
        if core is None:
            return super().forward(input_)
        partial = core(input_, self.weight)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        else:
            y = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None
