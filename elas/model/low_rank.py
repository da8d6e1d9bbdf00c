"""Low-rank linears with bottleneck tensor parallelism: collectives move the rank-r vector, never the hidden one.

Legend: s sequence, b batch, h input width, o output width, r rank, t tensor-parallel ranks, n factor pairs.

    column (QKV, up)   x [s, b, h] ─ factor_in [n·r, h] ─→ u [s, b, n·r] ─⇄─ factor_out [o/t, r] ─→ y [s, b, o/t]
    row (out, down)    x [s, b, h/t] ─ factor_in [r, h/t] ─→ v [s, b, r] ─⇄─ factor_out [o, r] ─→ y [s, b, o]

⇄ is the only place where ranks talk: nothing / all-reduce (forward / backward) in the column form and all-reduce /
nothing in the row form; with sequence parallelism all-gather / reduce-scatter and reduce-scatter / all-gather. The
replicated factor stands on the side of the full hidden vector. A layer of attention and FFN so sends 3r + r + r + r
values a token where Megatron's column/row pairs send 4h (DESIGN of BOOST, MLSys '26, arXiv 2512.12131).

Under sequence parallelism the replicated factors see their own shard of the tokens only, so their gradients are
partial: they carry `sequence_parallel = True` and `elas.train.grads` sums them.

CoLA (arXiv 2502.10940) puts a non-linearity between the factors: after the full sum over the input, so behind the
reduction in the row form.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide, get_tensor_model_parallel_group_if_none

from elas.model.activation import Activation
from elas.model.transformer_config import ElasTransformerConfig


def factor_std(kind: str, rank: int, size: int, in_size: int, out_size: int) -> float:
    """Standard deviation of a factor's normal initialisation.

    Args:
        kind: `lowrank`: sqrt(2 / (size + r)), as LORO; `cola`: (in + out)^(-1/4) / r^(1/4), as CoLA.
        rank: r.
        size: the factor's long dimension.
        in_size: input width of the pair.
        out_size: output width of the pair.
    """
    if kind == "cola":
        return (in_size + out_size) ** -0.25 / rank**0.25
    return math.sqrt(2.0 / (size + rank))


class _LowRankLinear(MegatronModule):
    """What both forms share: configuration, tensor-parallel group, and making of factors."""

    def __init__(self, config: ElasTransformerConfig, bias: bool, tp_group, is_expert: bool):
        super().__init__(config=config)
        if bias or is_expert:
            raise ValueError("low-rank linears have no bias and do not serve as experts")
        self.rank = config.low_rank.rank
        self.kind = config.low_rank.kind
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.tp = self.tp_group.size()
        self.sequence_parallel = config.sequence_parallel
        self.activation: Callable | None = None
        if self.kind == "cola":
            self.activation = Activation(config, config.low_rank.activation)

    def _factor(self, rows: int, columns: int, std: float, shard_dim: int | None) -> torch.nn.Parameter:
        device = torch.cuda.current_device()
        factor = torch.nn.Parameter(torch.empty(rows, columns, device=device, dtype=self.config.params_dtype))
        factor.init_std = std
        if shard_dim is None:
            factor.sequence_parallel = self.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(factor, True, shard_dim, 1)
        return factor


class LowRankColumnParallelLinear(_LowRankLinear):
    """`y = (x · factor_inᵀ) · factor_outᵀ`, output features split over tensor-parallel ranks; one or more pairs.

    Several pairs on one input (Q, K and V; gate and up) share `factor_in [n·r, h]`, stacked, so that one GEMM and one
    collective serve them all; each keeps its own `factor_out_NAME [o/t, r]` (one pair: just `factor_out`).

    Args:
        input_size: h.
        output_size: total of the pairs' outputs over all ranks.
        config: carries rank, kind, dtype and sequence parallelism.
        outputs: output width by pair name, over all ranks; None: Megatron's meaning of `tp_comm_buffer_name`, that is
            q, k and v for `qkv`, gate and up for `fc1` of a gated FFN, else a single pair.
        tp_comm_buffer_name: Megatron's name of the place, `qkv` or `fc1`.
        tp_group: tensor-parallel group; None takes Megatron's.
        init_method, gather_output, bias, skip_bias_add, is_expert, stride: Megatron's; only their defaults work.

    Raises:
        ValueError: bias, expert or gathered output asked for, or widths that do not add up.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ElasTransformerConfig,
        outputs: dict[str, int] | None = None,
        init_method: Callable | None = None,
        gather_output: bool = False,
        bias: bool = False,
        skip_bias_add: bool = True,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group=None,
        stride: int = 1,
    ):
        super().__init__(config, bias, tp_group, is_expert)
        if gather_output:
            raise ValueError("low-rank column-parallel linears keep their output split")
        self.outputs = outputs or self._outputs_of(tp_comm_buffer_name, output_size)
        if sum(self.outputs.values()) != output_size:
            raise ValueError(f"outputs {self.outputs} do not add up to output_size={output_size}")
        n = len(self.outputs)
        std_in = factor_std(self.kind, self.rank, input_size, input_size, output_size // n)
        self.factor_in = self._factor(n * self.rank, input_size, std_in, None)
        for name, size in self.outputs.items():
            std = factor_std(self.kind, self.rank, size, input_size, size)
            self.register_parameter(self._factor_name(name), self._factor(divide(size, self.tp), self.rank, std, 0))

    def _outputs_of(self, place: str | None, output_size: int) -> dict[str, int]:
        if place == "qkv":
            heads = self.config.kv_channels * self.config.num_attention_heads
            groups = self.config.kv_channels * self.config.num_query_groups
            return {"q": heads, "k": groups, "v": groups}
        if place == "fc1" and self.config.gated_linear_unit:
            return {"gate": output_size // 2, "up": output_size // 2}
        return {"out": output_size}

    def _factor_name(self, name: str) -> str:
        return "factor_out" if len(self.outputs) == 1 else f"factor_out_{name}"

    @property
    def output_factors(self) -> list[torch.nn.Parameter]:
        """The `factor_out` of each pair, `[o/t, r]`."""
        return [getattr(self, self._factor_name(name)) for name in self.outputs]

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Input side and the collective: `x [s, b, h]` (`[s/t, b, h]` with sequence parallelism) to `u [s, b, n·r]`."""
        u = F.linear(x, self.factor_in)
        if self.activation is not None:
            u = self.activation(u)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(u, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(u, group=self.tp_group)

    def expand(self, u: torch.Tensor) -> list[torch.Tensor]:
        """Output side: `u [s, b, n·r]` to one `[s, b, o/t]` for each pair."""
        factors = self.output_factors
        return [F.linear(part, factor) for part, factor in zip(u.split(self.rank, dim=-1), factors)]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Megatron's form: all outputs in one tensor, and no bias.

        Pairs are concatenated, except q, k and v, which Megatron's attention wants grouped by key/value head.
        """
        parts = self.expand(self.bottleneck(x))
        if list(self.outputs) == ["q", "k", "v"]:
            groups = divide(self.config.num_query_groups, self.tp)
            parts = [part.view(*part.shape[:-1], groups, -1) for part in parts]
            return torch.cat(parts, dim=-1).flatten(-2), None
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)), None


class LowRankRowParallelLinear(_LowRankLinear):
    """`y = (x · factor_inᵀ) · factor_outᵀ`, input features split over tensor-parallel ranks.

    Args:
        input_size: width of the input over all ranks.
        output_size: o.
        config: carries rank, kind, dtype and sequence parallelism.
        tp_group: tensor-parallel group; None takes Megatron's.
        init_method, bias, input_is_parallel, skip_bias_add, is_expert, tp_comm_buffer_name, stride: Megatron's; only
            their defaults work.

    Raises:
        ValueError: bias, expert or unsplit input asked for.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ElasTransformerConfig,
        init_method: Callable | None = None,
        bias: bool = False,
        input_is_parallel: bool = True,
        skip_bias_add: bool = True,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group=None,
        stride: int = 1,
    ):
        super().__init__(config, bias, tp_group, is_expert)
        if not input_is_parallel:
            raise ValueError("low-rank row-parallel linears take a split input")
        std_in = factor_std(self.kind, self.rank, input_size, input_size, output_size)
        std_out = factor_std(self.kind, self.rank, output_size, input_size, output_size)
        self.factor_in = self._factor(self.rank, divide(input_size, self.tp), std_in, 1)
        self.factor_out = self._factor(output_size, self.rank, std_out, None)

    def finish(self, v: torch.Tensor) -> torch.Tensor:
        """The collective and the output side: partial sums `v [s, b, r]` to `y [s, b, o]` (`[s/t, b, o]`)."""
        if self.sequence_parallel:
            v = reduce_scatter_to_sequence_parallel_region(v, group=self.tp_group)
        else:
            v = reduce_from_tensor_model_parallel_region(v, group=self.tp_group)
        if self.activation is not None:
            v = self.activation(v)
        return F.linear(v, self.factor_out)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`x [s, b, i/t]` to `y [s, b, o]` (`[s/t, b, o]` with sequence parallelism), and no bias."""
        return self.finish(F.linear(x, self.factor_in)), None
