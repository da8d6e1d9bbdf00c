"""Megatron-core's `TransformerConfig` with what low-rank, 2:4-sparse layers need to know, and its making from ours."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from elas import host
from elas.config import Config, LowRankConfig, SparsityConfig, ffn_width


@dataclass
class ElasTransformerConfig(TransformerConfig):
    """A `TransformerConfig` that every module receives, with the low-rank and sparsity sections.

    An engineer with a Megatron-LM training script makes this in place of `TransformerConfig` and hands it to
    `elas.model.spec.block_spec`.
    """

    low_rank: LowRankConfig = field(default_factory=LowRankConfig)
    """How linears are factored."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """2:4 sparsity of the squared-ReLU activation."""
    ffn_activation: str = "relu2"
    """FFN non-linearity: swiglu or relu2."""
    init_std: float = 0.02
    """Standard deviation of full-rank weights."""


def leave_uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    """Megatron's `init_method` that does nothing: `elas.model.init` fills every parameter afterwards."""
    return tensor


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(config: Config) -> ElasTransformerConfig:
    """Translate our configuration into Megatron-core's.

    Args:
        config: a validated configuration.

    Returns:
        The configuration every Megatron module takes. Dropout is 0 and there are no biases, as in Llama.
    """
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.train.dtype]
    gated = model.activation == "swiglu"
    return ElasTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        ffn_hidden_size=ffn_width(config),
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.relu,
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
        # With two stages an interleaved pipeline sends to and receives from the same rank in both directions at once;
        # batched, gloo would match a forward message with a backward one. Unbatched, Megatron uses a group a direction.
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        batch_p2p_sync=host.has_cuda(),  # it calls torch.cuda.synchronize
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        low_rank=config.low_rank,
        sparsity=config.sparsity,
        ffn_activation=model.activation,
        init_std=model.init_std,
    )
