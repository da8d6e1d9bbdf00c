"""Every field of Megatron-core 0.16's `TransformerConfig`, and whether our layers support it.

`tests/megatron/test_features.py` fails if a field is in none of these tables, so that no feature of a new version of
Megatron-core is ignored silently. `elas.model.check.check` applies them.
"""


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# The layers compute what the field says, mostly since they consist of Megatron's parts.
WORKS = _each(
    """
tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
context_parallel_size perform_initialization use_cpu_initialization bf16 params_dtype pipeline_dtype
num_microbatches_with_partial_activation_checkpoints cross_entropy_loss_fusion cross_entropy_fusion_impl
variable_seq_lengths deallocate_pipeline_outputs microbatch_group_size_per_vp_stage
num_layers num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
hidden_size num_attention_heads softmax_scale num_query_groups ffn_hidden_size kv_channels hidden_dropout
attention_dropout layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit
rotary_interleaved window_size window_attn_skip_freq normalization qk_layernorm qk_l2_norm calculate_per_token_loss
no_rope_freq init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
softmax_type activation_func
""",
    "supported",
)

_EXPERTS = "there are no experts (num_moe_experts is refused)"
_TP_OVERLAP = "an option of tp_comm_overlap, which is refused"
_FP8 = "an option of fp8 or fp4, which are refused"
_FUSION = "chooses a fused kernel for the same values; ours has its own"
_PARTS = "an option of a feature that is refused"
_PLUMBING = "how Megatron schedules or communicates; values are the same"

SAME = {
    **_each(
        "pipeline_model_parallel_comm_backend timers finalize_model_grads_func grad_scale_func no_sync_func "
        "grad_sync_func param_sync_func overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p "
        "overlap_p2p_comm_warmup_flush async_tensor_model_parallel_allreduce barrier_with_L1_time "
        "clone_scatter_output_in_embedding config_logger_dir wgrad_deferral_limit "
        "hetereogenous_dist_checkpoint use_te_rng_tracker",
        _PLUMBING,
    ),
    "cp_comm_type": "keys and values are always gathered over context-parallel ranks; values are the same",
    "deterministic_mode": "torch.use_deterministic_algorithms decides for our layers",
    "transformer_impl": "the layers are ours; embedding and output layer are Megatron's local ones",
    "expert_tensor_parallel_size": _EXPERTS,
    **_each(
        "moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate "
        "moe_shared_expert_overlap moe_router_load_balancing_type moe_router_topk moe_enable_routing_replay "
        "moe_router_topk_limited_devices moe_router_padding_for_quantization moe_router_padding_for_fp8 "
        "moe_router_num_groups moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
        "moe_router_score_function moe_router_dtype moe_router_enable_expert_bias moe_router_bias_update_rate "
        "moe_router_force_load_balancing moe_grouped_gemm moe_use_legacy_grouped_gemm moe_aux_loss_coeff "
        "moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping moe_token_dispatcher_type moe_enable_deepep "
        "moe_flex_dispatcher_backend moe_per_layer_logging moe_expert_capacity_factor "
        "moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute moe_permute_fusion "
        "moe_router_fusion moe_apply_probs_on_input moe_latent_size moe_deepep_num_sms moe_hybridep_num_sms "
        "use_fused_weighted_squared_relu ep_overlap_early_attn_memory_release",
        _EXPERTS,
    ),
    **_each(
        "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
        "tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv "
        "tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend",
        _TP_OVERLAP,
    ),
    **_each(
        "fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_wgrad tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 "
        "num_layers_at_end_in_bf16 fp4_recipe fp4_param fp4_quantizer_factory "
        "disable_parameter_transpose_cache",
        _FP8,
    ),
    **_each(
        "gradient_accumulation_fusion bias_activation_fusion masked_softmax_fusion persist_layer_norm "
        "memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion",
        _FUSION,
    ),
    "apply_query_key_layer_scaling": "divides scores before the softmax and multiplies them back inside it",
    "attention_softmax_in_fp32": "the softmax is always in fp32",
    "disable_bf16_reduced_precision_matmul": "a setting of torch, which Megatron sets",
    "use_te_activation_func": "for Megatron's own MLP, which then gets 2:4 from `ElasSpecProvider.activation_func`",
    **_each(
        "mtp_loss_scaling_factor qk_clip_alpha qk_clip_threshold dsa_indexer_n_heads dsa_indexer_head_dim "
        "dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads autocast_dtype "
        "cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights "
        "cpu_offloading_double_buffering kitchen_attention_backend cuda_graph_use_single_mempool "
        "cuda_graph_retain_backward_graph cuda_graph_warmup_steps cuda_graph_scope mamba_state_dim "
        "mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path offload_modules "
        "min_offloaded_tensor_size",
        _PARTS,
    ),
    **_each(
        "inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill",
        "inference only; same values",
    ),
}

_NO_EXPERTS = ("there are no low-rank, 2:4-sparse experts", "leave it out")
_OWN_LINEARS = ("only Transformer Engine's linears support it", "leave it out")
_OWN_ATTENTION = ("attention is torch's scaled_dot_product_attention, which does not support it", "leave it out")
_INFERENCE = ("the layers have no inference mode", "leave it out; export the model for inference")

# Refused unless the field has its default.
REFUSED: dict[str, tuple] = {
    "fp16": ("relu² overflows float16 above 256", "use bf16"),
    "enable_autocast": ("the squared-ReLU core has one dtype", "use bf16=True, without autocast"),
    **dict.fromkeys(
        ["num_moe_experts", "moe_extended_tp", "expert_model_parallel_size", "overlap_moe_expert_parallel_comm"],
        _NO_EXPERTS,
    ),
    **dict.fromkeys(
        ["tp_comm_overlap", "delay_wgrad_compute", "fp8", "fp4", "fp8_dot_product_attention", "symmetric_ar_type"],
        _OWN_LINEARS,
    ),
    **dict.fromkeys(["fp8_multi_head_attention", "activation_func_fp8_input_store", "quant_recipe"], _OWN_LINEARS),
    **dict.fromkeys(["use_kitchen", "use_kitchen_attention", "cpu_offloading"], _OWN_LINEARS),
    "fine_grained_activation_offloading": _OWN_LINEARS,
    "defer_embedding_wgrad_compute": ("Megatron's local column-parallel linear breaks with it", "leave it out"),
    "hierarchical_context_parallel_sizes": ("context parallelism gathers keys over one group", "leave it out"),
    "hybrid_context_parallel": ("context parallelism gathers keys over one group", "leave it out"),
    "max_seqlen_per_dp_cp_rank": ("context parallelism gathers keys over one group", "leave it out"),
    "mtp_num_layers": ("there are no multi-token prediction layers", "leave it out"),
    "mtp_standalone": ("there are no multi-token prediction layers", "leave it out"),
    "attention_backend": ("torch chooses the kernel", "leave it out; see torch.nn.attention.sdpa_kernel"),
    "fp32_residual_connection": ("our norms keep the dtype of their input", "leave it out"),
    "apply_residual_connection_post_layernorm": ("Megatron-core's own layer ignores it", "leave it out"),
    "glu_linear_offset": ("the gated FFN is silu(gate) · up", "leave it 0"),
    "activation_func_clamp_value": ("activations are not clamped", "leave it out"),
    **dict.fromkeys(["qk_clip", "log_max_attention_logit", "batch_invariant_mode"], _OWN_ATTENTION),
    "attention_output_gate": ("there is no low-rank gate beside Q, K and V", "leave it out"),
    "multi_latent_attention": ("there is no low-rank form of MLA", "leave it out"),
    "experimental_attention_variant": ("attention is the softmax kind", "leave it out"),
    "linear_attention_freq": ("attention is the softmax kind", "leave it out"),
    "test_mode": ("it compares norms of q and k, which low-rank layers call elsewhere", "leave it out"),
    "init_model_with_meta_device": ("factors are initialised when they are created", "leave it out"),
    "fused_single_qkv_rope": ("q, k and v are never one tensor", "leave it out"),
    "mrope_section": ("positions have one dimension", "use rope"),
    "is_hybrid_model": ("there are no Mamba layers", "leave it out"),
    "heterogeneous_block_specs": ("all layers are alike", "leave it out"),
    **dict.fromkeys(["enable_cuda_graph", "external_cuda_graph"], ("not tested with our kernels", "leave it out")),
    "cuda_graph_impl": ("not tested with our kernels", "leave it none"),
    **dict.fromkeys(["flash_decode", "use_inference_optimized_layers", "inference_fuse_tp_communication"], _INFERENCE),
}

_HOW_ONLY = """
overlap_moe_expert_parallel_comm expert_model_parallel_size moe_extended_tp tp_comm_overlap delay_wgrad_compute
symmetric_ar_type cpu_offloading fine_grained_activation_offloading defer_embedding_wgrad_compute
hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank attention_backend
apply_residual_connection_post_layernorm log_max_attention_logit batch_invariant_mode test_mode
init_model_with_meta_device fused_single_qkv_rope enable_cuda_graph external_cuda_graph cuda_graph_impl flash_decode
use_inference_optimized_layers inference_fuse_tp_communication
"""
HOW_ONLY = set(_HOW_ONLY.split())
"""Refused fields that change how a step runs and not what it computes: checkpoints trained with them can be used."""

# Arguments of Megatron-LM outside its TransformerConfig that our model would not follow.
ARGUMENTS_REFUSED = {
    "yaml_cfg": "arguments are read from the command line",
    "spec": "the layers are ours",
    "use_legacy_models": "the layers are Megatron-core's",
    "heterogeneous_layers_config_path": "all layers are alike",
    "reset_attention_mask": "attention is causal over the whole sample",
}
