"""Our full-rank layers without 2:4 beside Megatron-core's own, feature by feature: same weights, same loss."""

import torch
from small import SIZES, batch, loss_of

BASE = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    add_bias_linear=False,
    normalization="RMSNorm",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_activation_fusion=False,
    masked_softmax_fusion=False,
    bias_dropout_fusion=False,
    persist_layer_norm=False,
    apply_rope_fusion=False,
    gradient_accumulation_fusion=False,
    batch_p2p_sync=False,
)
VARIANTS = {  # fields of the configuration, and arguments of the model
    "plain": ({}, {}),
    "add_bias_linear": ({"add_bias_linear": True}, {}),
    "add_qkv_bias": ({"add_qkv_bias": True}, {}),
    "swiglu": ({"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}, {}),
    "swiglu with biases": (
        {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": True},
        {},
    ),
    "num_query_groups": ({"num_query_groups": 2}, {}),
    "kv_channels": ({"kv_channels": 24}, {}),
    "softmax_scale": ({"softmax_scale": 0.3}, {}),
    "softmax_type off-by-one": ({"softmax_type": "off-by-one"}, {}),
    "window_size": ({"window_size": (6, 0)}, {}),
    "window_attn_skip_freq": ({"window_size": (6, 0), "window_attn_skip_freq": 2}, {}),
    "apply_query_key_layer_scaling": ({"apply_query_key_layer_scaling": True}, {}),
    "normalization LayerNorm": ({"normalization": "LayerNorm"}, {}),
    "layernorm_epsilon": ({"layernorm_epsilon": 0.1}, {}),
    "qk_layernorm": ({"qk_layernorm": True}, {}),
    "qk_l2_norm": ({"qk_l2_norm": True}, {}),
    "rotary_interleaved": ({"rotary_interleaved": True}, {}),
    "no_rope_freq": ({"no_rope_freq": [0, 1]}, {}),
    "rotary_percent": ({}, {"rotary_percent": 0.5}),
    "rope_scaling": ({}, {"rope_scaling": True, "rope_scaling_factor": 4.0}),
    "rotary_base": ({}, {"rotary_base": 500}),
    "seq_len_interpolation_factor": ({}, {"seq_len_interpolation_factor": 3.0}),
    "learned positions": ({}, {"position_embedding_type": "learned_absolute"}),
    "hidden_dropout": ({"hidden_dropout": 0.2}, {}),
    "tied embeddings": ({}, {"share_embeddings_and_output_weights": True}),
    "fp32 residual off, recompute": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {},
    ),
}


def against_megatron() -> dict[str, tuple[float, float]]:
    """By variant: relative difference of the loss and the largest of the gradients."""
    from elas import parallel
    from elas.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    return {name: _difference(*variant) for name, variant in VARIANTS.items()}


def _difference(fields: dict, arguments: dict) -> tuple[float, float]:
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from elas.config import LowRankConfig, SparsityConfig
    from elas.model.spec import block_spec
    from elas.model.transformer_config import ElasTransformerConfig

    fields = {**BASE, "activation_func": squared_relu, **fields}
    sections = {"low_rank": LowRankConfig(kind="none"), "sparsity": SparsityConfig(kind="none")}
    ours_config, theirs_config = ElasTransformerConfig(**fields, **sections), TransformerConfig(**fields)
    options = {"vocab_size": SIZES["vocab_size"], "max_sequence_length": 64, "position_embedding_type": "rope"}
    ours = GPTModel(ours_config, block_spec(ours_config), **{**options, **arguments})
    spec = get_gpt_layer_local_spec(
        qk_layernorm=theirs_config.qk_layernorm,
        qk_l2_norm=theirs_config.qk_l2_norm,
        normalization=theirs_config.normalization,
    )
    theirs = GPTModel(theirs_config, spec, **{**options, **arguments})
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.parameters():
        with torch.no_grad():
            scale = 1.0 if parameter.dim() == 1 else 0.08
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    theirs.load_state_dict(ours.state_dict())
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(9)
        losses.append(loss_of(model, *batch()))
        losses[-1].backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    gradient = max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)
    return abs(float(losses[0] / losses[1]) - 1), gradient


def recomputed_against_kept() -> dict[str, float]:
    """By variant, of low-rank layers: largest difference of a gradient with `recompute_bottleneck`, from without."""
    from elas import parallel
    from elas.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    return {name: _recomputed(*variant) for name, variant in VARIANTS.items()}


def _recomputed(fields: dict, arguments: dict) -> float:
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel

    from elas.config import LowRankConfig, SparsityConfig
    from elas.model.spec import block_spec
    from elas.model.transformer_config import ElasTransformerConfig

    options = {"vocab_size": SIZES["vocab_size"], "max_sequence_length": 64, "position_embedding_type": "rope"}
    sections = {"low_rank": LowRankConfig(rank=16), "sparsity": SparsityConfig(kind="none")}
    gradients = []
    for again in (False, True):
        given = {**BASE, "activation_func": squared_relu, **fields, **sections, "recompute_bottleneck": again}
        config = ElasTransformerConfig(**given)
        torch.manual_seed(3)
        model = GPTModel(config, block_spec(config), **{**options, **arguments})
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            with torch.no_grad():
                scale = 1.0 if parameter.dim() == 1 else 0.08
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
        torch.manual_seed(9)
        loss_of(model, *batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))


REFUSED = {
    "fp16": True,
    "enable_autocast": True,
    "num_moe_experts": 4,
    "tp_comm_overlap": True,
    "fp8": "hybrid",
    "cpu_offloading": True,
    "mtp_num_layers": 1,
    "fp32_residual_connection": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "qk_clip": True,
    "attention_output_gate": True,
    "multi_latent_attention": True,
    "fused_single_qkv_rope": True,
    "heterogeneous_block_specs": True,
    "delay_wgrad_compute": True,
    "softmax_type": "learnable",
    "window_size": (4, 2),
    "normalization": "L2Norm",
    "test_mode": True,
    "batch_invariant_mode": True,
    "hybrid_context_parallel": True,
    "attention_backend": "flash",
    "linear_attention_freq": 2,
}
