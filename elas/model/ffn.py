"""The feed-forward layer: one class for full-rank and low-rank, gated and squared-ReLU, dense and 2:4.

Legend: s sequence, b batch, h hidden, f d_ff, r rank (h at full rank), t tensor-parallel ranks.

    squared ReLU   u = bottleneck(x) [s, b, r];  v = prune(relu²(u · M_upᵀ)) · N_downᵀ [s, b, r];  y = finish(v)
    SwiGLU         gate, up [s, b, f/t];  y = down(silu(gate) · up)

With low rank, M_up is `linear_fc1.factor_out [f/t, r]` and N_down `linear_fc2.factor_in [r, f/t]`: u and v are r wide,
and the kernel (`elas.kernels.relu2_24`) decides what it keeps of the f-wide activation. At full rank the same core runs
on the weights, with u = x and v the partial output. Each linear passes its weight to the core during its own call
(`elas.model.core_call`). Errors of the kernel are raised under configuration keys (`elas.model.kernel`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from elas.errors import ConfigError
from elas.kernels.relu2_24 import ffn_core
from elas.model.activation import STEP_KEY, SparseSwitch
from elas.model.check import check
from elas.model.kernel import keys_of
from elas.model.recompute import Again
from elas.model.transformer_config import ElasTransformerConfig


class ElasFFN(SparseSwitch):
    """An FFN with the shape and parameter names of Megatron's `MLP`, and the squared-ReLU core as one operation.

    Args:
        config: widths, rank, activation, sparsity.
        submodules: the two linears, from `ElasSpecProvider`.
        tp_group: tensor-parallel group; None takes Megatron's.
    """

    linear_fc1: Any  # a module of `submodules`, as is fc2
    linear_fc2: Any
    submodules: MLPSubmodules  # set by `ffn_class`, as is tp_group
    tp_group = None

    def __init__(self, config: ElasTransformerConfig, submodules: MLPSubmodules | None = None, tp_group=None):
        check(config)
        assert config.ffn_activation is not None and config.ffn_hidden_size is not None  # __post_init__ sets them
        super().__init__(config.sparsity, config.ffn_activation)
        submodules, tp_group = submodules or self.submodules, tp_group or self.tp_group
        self.config = config
        self.gated = config.ffn_activation == "swiglu"
        shared = dict(config=config, bias=config.add_bias_linear, skip_bias_add=True, is_expert=False)
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            config.hidden_size,
            config.ffn_hidden_size * (2 if self.gated else 1),
            init_method=config.init_method,
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
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="fc2",
            tp_group=tp_group,
            **shared,
        )
        self.full_rank = isinstance(self.linear_fc1, ColumnParallelLinear)
        if config.recompute_bottleneck and self.gated:
            self.linear_fc1.remembers = True

    def forward(self, x: torch.Tensor, **_unused) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x [s, b, h]` (`[s/t, b, h]` with sequence parallelism) to the same shape, and the bias `[h]` or None."""
        return self._gated(x) if self.gated else self._squared_relu(x)

    def _gated(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.full_rank:
            both, bias = self.linear_fc1(x)
            gate, up = (both if bias is None else both + bias).chunk(2, dim=-1)
            return self.linear_fc2(F.silu(gate) * up)
        gate, up = self.linear_fc1(x, split=True)
        u = self.linear_fc1.recall()
        if u is None:
            return self.linear_fc2(F.silu(gate) * up)

        def compute() -> tuple[torch.Tensor, ...]:
            gate, up = self.linear_fc1(u, expand=True)
            gated = F.silu(gate)
            return gate, up, gated, gated * up

        again = Again(compute)
        with again.hooks():
            again.drop(gate, up)
            gated = F.silu(gate)
            again.drop(gated)
            product = gated * up
            again.drop(product)
            return self.linear_fc2(product)

    def _squared_relu(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        options, implementation = self.options, self.config.sparsity.implementation

        def within_fc1(u: torch.Tensor, m_up: torch.Tensor):
            self.observer.look(x, self.linear_fc1.project, self.sparse)
            return self.linear_fc2(
                u, core=lambda u, n_down: ffn_core(u, m_up, n_down, options, implementation=implementation)
            )

        try:
            return self.linear_fc1(x, core=within_fc1)
        except ConfigError as error:
            raise error.renamed(keys_of(self.config.low_rank)) from None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's description of the parameters for distributed checkpoints, as of its own `MLP`.

        At full rank, gate and up are one weight, and each rank holds a part of both halves; Megatron's factory splits
        it for saving. Low-rank gate and up are separate parameters.
        """
        described = {}
        for name, module in self.named_children():
            part = sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
            if self.gated and self.full_rank and name == "linear_fc1":
                singly = (metadata or {}).get("singleton_local_shards", False)
                for key in part.keys() & {f"{prefix}{name}.weight", f"{prefix}{name}.bias"}:
                    part[key] = apply_swiglu_sharded_factory(part[key], sharded_offsets, singly)
            described |= part
        if self.dense_steps:
            own = {STEP_KEY: self.sparsity_step}
            described |= make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {},
                sharded_offsets,
                tp_group=self.linear_fc1.tp_group,
                dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
            )
        return described


def ffn_class(submodules: MLPSubmodules, tp_group=None) -> type[ElasFFN]:
    """`ElasFFN` with its linears as a class: Megatron's `TransformerLayer` warns about specs of other MLPs."""
    return type("ElasFFN", (ElasFFN,), {"submodules": submodules, "tp_group": tp_group})
