"""Low-rank linears with bottleneck tensor parallelism: collectives move r values a token, never h.

Legend: s sequence, b batch, h input width, o output width, r rank, t tensor-parallel ranks, n factor pairs.

    column (QKV, up)   x [s, b, h] ─ factor_in [n·r, h] ─→ u [s, b, n·r] ─⇄─ factor_out [o/t, r] ─→ y [s, b, o/t]
    row (out, down)    x [s, b, h/t] ─ factor_in [r, h/t] ─→ v [s, b, r] ─⇄─ factor_out [o, r] ─→ y [s, b, o]

⇄ is the only communication. Forward / backward it is nothing / all-reduce in the column form and all-reduce / nothing
in the row form; with sequence parallelism all-gather / reduce-scatter and reduce-scatter / all-gather. The factor next
to the full hidden vector is replicated. A layer of attention and FFN sends 3r + r + r + r values a token, where
Megatron's column/row pairs send 4h (design of BOOST, MLSys '26, arXiv 2512.12131).

Under sequence parallelism a replicated factor sees its rank's shard of the tokens, so its gradient is a partial sum:
the factor has `sequence_parallel = True`, and `elas.engine.grads` sums over ranks.

CoLA (arXiv 2502.10940) has a non-linearity between the factors. It needs the full sum over the input, so in the row
form it comes after the reduction.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

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
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide, get_tensor_model_parallel_group_if_none

from elas import accelerator
from elas.model.activation import Activation
from elas.model.core_call import Core, Pairs, check_plain_call, with_bias
from elas.model.factor_std import factor_std
from elas.model.factors import draw_factor
from elas.model.recompute import Remembers, norm_again
from elas.model.transformer_config import ElasTransformerConfig


class _LowRankLinear(MegatronModule):
    """Shared by both forms: configuration, tensor-parallel group, creating and saving factors."""

    config: ElasTransformerConfig
    factor_in: torch.nn.Parameter

    def __init__(self, config: ElasTransformerConfig, skip_bias_add: bool, tp_group, is_expert: bool):
        super().__init__(config=config)
        if is_expert:
            raise ValueError("low-rank linears cannot be experts")
        self.rank = config.low_rank.rank
        self.kind = config.low_rank.kind
        self.skip_bias_add = skip_bias_add
        self.tp_group: Any = get_tensor_model_parallel_group_if_none(tp_group)
        self.tp = self.tp_group.size()
        self.sequence_parallel = config.sequence_parallel
        self.activation: Callable | None = None
        if self.kind == "cola":
            self.activation = Activation(config.sparsity, config.low_rank.activation)

    def _factor(self, rows: int, columns: int, std: float, shard_dim: int | None) -> torch.nn.Parameter:
        factor: Any = self._parameter(rows, columns, shard_dim=shard_dim)
        factor.init_std = std
        draw_factor(factor, self.config, self.tp_group)
        return factor

    def _bias(self, size: int, shard_dim: int | None) -> torch.nn.Parameter:
        bias = self._parameter(size, shard_dim=shard_dim)
        torch.nn.init.zeros_(bias)
        return bias

    def _parameter(self, *shape: int, shard_dim: int | None) -> torch.nn.Parameter:
        device = "cpu" if self.config.use_cpu_initialization else accelerator.device()
        parameter: Any = torch.nn.Parameter(torch.empty(*shape, device=device, dtype=self.config.params_dtype))
        if shard_dim is None:
            parameter.sequence_parallel = self.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(parameter, True, shard_dim, 1)
        return parameter

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's description of the parameters for distributed checkpoints: which are split, and along what."""
        parameters: dict[str, Any] = dict(self.named_parameters())
        axes = {
            name: parameter.partition_dim
            for name, parameter in parameters.items()
            if getattr(parameter, "tensor_model_parallel", False)
        }
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class LowRankColumnParallelLinear(Pairs, Remembers, _LowRankLinear):
    """`y = (x · factor_inᵀ) · factor_outᵀ`, output features split over tensor-parallel ranks; one or more pairs.

    Several pairs with one input (Q, K and V; gate and up) share a stacked `factor_in [n·r, h]`, so that one GEMM and
    one collective serve them all. Each has its own `factor_out_NAME [o/t, r]`; that of a single pair is `factor_out`.

    Args:
        input_size: h.
        output_size: total of the pairs' outputs over all ranks.
        config: rank, kind, dtype and sequence parallelism.
        outputs: output width by pair name, over all ranks; None: from `tp_comm_buffer_name`, that is q, k and v for
            `qkv`, gate and up for `fc1` of a gated FFN, else a single pair.
        tp_comm_buffer_name: Megatron's name of the linear, `qkv` or `fc1`.
        tp_group: tensor-parallel group; None takes Megatron's.
        bias: whether outputs have one: `bias`, or `bias_NAME` for each of several pairs.
        skip_bias_add: whether the caller adds the bias, as with Megatron's linears.
        init_method: ignored; `draw_factor` initialises factors.
        gather_output, is_expert: Megatron's; only the defaults are supported.
        stride: Megatron's; ignored, since each pair is split separately.

    Raises:
        ValueError: an expert, gathered output, or widths that do not add up.
    """

    factor_out: torch.nn.Parameter  # of a single pair
    bias: torch.nn.Parameter | None  # likewise
    input_norm: tuple[Any] | None = None
    """The norm whose output is the input and need not be kept (`elas.model.recompute`); in a tuple, so that it does
    not become a submodule."""

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
        super().__init__(config, skip_bias_add, tp_group, is_expert)
        if gather_output:
            raise ValueError("low-rank column-parallel linears keep their output split")
        self.place = tp_comm_buffer_name
        self.outputs = outputs or self._outputs_of(tp_comm_buffer_name, output_size)
        if sum(self.outputs.values()) != output_size:
            raise ValueError(f"outputs {self.outputs} do not add up to output_size={output_size}")
        n = len(self.outputs)
        std_in = factor_std(self.kind, self.rank, input_size, input_size, output_size // n)
        self.factor_in = self._factor(n * self.rank, input_size, std_in, None)
        for name, size in self.outputs.items():
            std = factor_std(self.kind, self.rank, size, input_size, size)
            self.register_parameter(
                self._name("factor_out", name), self._factor(divide(size, self.tp), self.rank, std, 0)
            )
        for name, size in self.outputs.items():
            own = self._bias(divide(size, self.tp), 0) if bias else None
            self.register_parameter(self._name("bias", name), own)

    def _outputs_of(self, place: str | None, output_size: int) -> dict[str, int]:
        if place == "qkv":
            config: Any = self.config  # Megatron's optional sizes are set in its `__post_init__`
            heads = config.kv_channels * config.num_attention_heads
            groups = config.kv_channels * config.num_query_groups
            return {"q": heads, "k": groups, "v": groups}
        if place == "fc1" and self.config.gated_linear_unit:
            return {"gate": output_size // 2, "up": output_size // 2}
        return {"out": output_size}

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Input side and the collective: `x [s, b, h]` (`[s/t, b, h]` with sequence parallelism) to `u [s, b, n·r]`."""
        again = norm_again(self.input_norm and self.input_norm[0], x)
        with contextlib.nullcontext() if again is None else again.hooks():
            u = F.linear(x, self.factor_in)
        if self.activation is not None:
            u = self.activation(u)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(u, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(u, group=self.tp_group)

    def expand(self, u: torch.Tensor, add_bias: bool = True) -> list[torch.Tensor]:
        """Output side: `u [s, b, n·r]` to one `[s, b, o/t]` for each pair."""
        biases = self.biases if add_bias else [None] * len(self.outputs)
        return [F.linear(*one) for one in zip(u.split(self.rank, dim=-1), self.output_factors, biases)]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's outputs `[n, o/t]` of tokens `x [n, h]`, without communication; only during a call."""
        u = F.linear(x, self.factor_in)
        return torch.cat(self.expand(u if self.activation is None else self.activation(u)), dim=-1)

    def forward(self, x: torch.Tensor, *, core: Core | None = None, split: bool = False, expand: bool = False):
        """By default as Megatron's: all outputs in one tensor `[s, b, o/t]`, and the bias that the caller is to add.

        Pairs are concatenated; q, k and v are grouped by key/value head, as Megatron's attention requires.

        Args:
            x: `[s, b, h]` (`[s/t, b, h]` with sequence parallelism).
            core: called with `u [s, b, r]` and `factor_out [o/t, r]` (with a bias both are 8 wider); its result is
                returned. `elas.model.core_call` explains why.
            split: return a tuple of one `[s, b, o/t]` for each pair instead, with biases added.
            expand: likewise, and x is the bottleneck `u [s, b, n·r]` (`recall`).
        """
        if expand:
            return tuple(self.expand(x))
        u = self.bottleneck(x)
        self.remember(u)
        if core is not None:
            return core(*with_bias(u, self.factor_out, self.bias))
        if split:
            return tuple(self.expand(u))  # not a list, whose tensors torch's backward hooks do not see
        check_plain_call(self.place, self.config)
        biases = [bias for bias in self.biases if bias is not None] if self.skip_bias_add else []
        return self._join(self.expand(u, add_bias=not biases)), self._join(biases) if biases else None

    def _join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if list(self.outputs) == ["q", "k", "v"]:
            groups = divide(self.config.num_query_groups, self.tp)
            parts = [part.view(*part.shape[:-1], groups, -1) for part in parts]
            return torch.cat(list(parts), dim=-1).flatten(-2)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


class LowRankRowParallelLinear(_LowRankLinear):
    """`y = (x · factor_inᵀ) · factor_outᵀ`, input features split over tensor-parallel ranks.

    Args:
        input_size: width of the input over all ranks.
        output_size: o.
        config: rank, kind, dtype and sequence parallelism.
        tp_group: tensor-parallel group; None takes Megatron's.
        bias: whether there is a `bias [o]`, replicated on every rank.
        skip_bias_add: whether the caller adds the bias, as with Megatron's linears.
        init_method: ignored; `draw_factor` initialises factors.
        input_is_parallel, is_expert: Megatron's; only the defaults are supported.
        tp_comm_buffer_name, stride: Megatron's; ignored.

    Raises:
        ValueError: an expert, or an input that is not split.
    """

    bias: torch.nn.Parameter | None

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
        super().__init__(config, skip_bias_add, tp_group, is_expert)
        if not input_is_parallel:
            raise ValueError("low-rank row-parallel linears require a split input")
        std_in = factor_std(self.kind, self.rank, input_size, input_size, output_size)
        std_out = factor_std(self.kind, self.rank, output_size, input_size, output_size)
        self.factor_in = self._factor(self.rank, divide(input_size, self.tp), std_in, 1)
        self.factor_out = self._factor(output_size, self.rank, std_out, None)
        self.register_parameter("bias", self._bias(output_size, None) if bias else None)

    def finish(self, v: torch.Tensor) -> torch.Tensor:
        """The collective and the output side: partial sums `v [s, b, r]` to `y [s, b, o]` (`[s/t, b, o]`)."""
        if self.sequence_parallel:
            v = reduce_scatter_to_sequence_parallel_region(v, group=self.tp_group)
        else:
            v = reduce_from_tensor_model_parallel_region(v, group=self.tp_group)
        if self.activation is not None:
            v = self.activation(v)
        return F.linear(v, self.factor_out)

    def forward(self, x: torch.Tensor, *, core: Core | None = None) -> tuple[torch.Tensor, torch.nn.Parameter | None]:
        """`x [s, b, i/t]` to `y [s, b, o]` (`[s/t, b, o]` with sequence parallelism), and the bias or None.

        Args:
            x: the input, or that of `core`.
            core: called with x and `factor_in [r, i/t]` instead of their product; returns partial sums `[s, b, r]`.
        """
        y = self.finish(F.linear(x, self.factor_in) if core is None else core(x, self.factor_in))
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None
