"""Megatron-core's `TransformerConfig` with settings of low-rank, 2:4-sparse layers, and its creation from ours."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from elas import accelerator
from elas.config import Config, LowRankConfig, SparsityConfig, ffn_width, recompute_of
from elas.model.check import ACTIVATIONS, ffn_activation_of


@dataclass
class ElasTransformerConfig(TransformerConfig):
    """Megatron's `TransformerConfig` with the low-rank and sparsity sections; every module receives it.

    A Megatron-core training script creates this instead of `TransformerConfig` and passes it to
    `elas.model.spec.block_spec`.

    Raises:
        ConfigError: an activation that the FFN does not support.
    """

    low_rank: LowRankConfig = field(default_factory=LowRankConfig)
    """How linears are factored."""
    sparsity: SparsityConfig = field(default_factory=lambda: SparsityConfig(dense_steps=0))
    """2:4 sparsity of the squared-ReLU activation; on from the first step unless there are dense steps."""
    ffn_activation: str | None = None
    """FFN non-linearity, swiglu or relu2; None derives it from activation_func and gated_linear_unit."""
    init_std: float = 0.02
    """Standard deviation of full-rank weights."""
    recompute_bottleneck: bool = False
    """Whether what follows from bottlenecks and the residual stream is computed again in the backward pass
    (`elas.model.recompute`); low rank only."""
    factor_init_method: Callable[[torch.Tensor], object] | None = None
    """Initialises a factor in place; None: normal with `elas.model.factor_std.factor_std`."""

    def __post_init__(self):
        super().__post_init__()
        self.ffn_activation = ffn_activation_of(self, self.ffn_activation)
        self.activation_func = ACTIVATIONS[self.ffn_activation]  # so that other code sees what is computed


def leave_uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    """An `init_method` for Megatron that does nothing: `elas.model.init` fills every parameter afterwards."""
    return tensor


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(config: Config) -> ElasTransformerConfig:
    """Translate our configuration into Megatron-core's.

    Args:
        config: a validated configuration.

    Returns:
        The configuration for Megatron's modules; no dropout and no biases, as in Llama.
    """
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.train.dtype]
    gated = model.activation == "swiglu"
    recompute = recompute_of(config)
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return ElasTransformerConfig(
        **(whole if recompute == "layer" else {}),
        recompute_bottleneck=recompute == "bottleneck",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        ffn_hidden_size=ffn_width(config),
        gated_linear_unit=gated,
        activation_func=ACTIVATIONS[model.activation],
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # With two stages an interleaved pipeline exchanges messages of both directions with one rank at once. If these
        # are batched, gloo matches a forward with a backward message; otherwise each direction has its own group.
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        batch_p2p_sync=accelerator.has_cuda(),  # it calls torch.cuda.synchronize
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        low_rank=config.low_rank,
        sparsity=config.sparsity,
        ffn_activation=model.activation,
        init_std=model.init_std,
    )
