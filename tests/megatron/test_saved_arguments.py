"""Arguments that Megatron-LM saved against our configuration: equal, named and refused, or of no consequence."""

import argparse
import dataclasses
import inspect
from pathlib import Path

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from small import small

from elas.checkpoint.arguments import FIELDS, KEYS, OF_GPT_MODEL, check_same_model, computed, flags, notes, saved
from elas.errors import ConfigError
from elas.model.features import HOW_ONLY, REFUSED
from elas.model.transformer_config import ElasTransformerConfig

# As core_v0.16.1 saved them in `common.pt` of a run by elas_builder, of `tests/megatron/small.py`'s model.
SAVED = dict(
    num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, group_query_attention=True, kv_channels=16,
    ffn_hidden_size=128, layernorm_epsilon=1e-6, layernorm_zero_centered_gamma=False, normalization="RMSNorm",
    swiglu=False, squared_relu=True, quick_geglu=False, openai_gelu=False, add_bias_linear=False, add_qkv_bias=False,
    untie_embeddings_and_output_weights=True, position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0,
    rotary_interleaved=False, use_rope_scaling=False, rope_scaling_factor=8.0, rotary_seq_len_interpolation_factor=None,
    no_rope_freq=None, window_size=None, window_attn_skip_freq=None, softmax_type="vanilla", qk_layernorm=False,
    qk_l2_norm=False, qk_clip=False, attention_dropout=0.0, hidden_dropout=0.0, bf16=False, fp16=False, fp8=None,
    num_experts=None, multi_latent_attention=False, mtp_num_layers=None, glu_linear_offset=0.0, spec=None,
    activation_func_clamp_value=None, attention_output_gate=False, fp32_residual_connection=False, yaml_cfg=None,
    reset_attention_mask=False, use_legacy_models=False, heterogeneous_layers_config_path=None, is_hybrid_model=False,
    te_precision_config_file=None, experimental_attention_variant=None, attention_backend=AttnBackend.auto,
    low_rank_kind="lowrank", low_rank_rank=16, low_rank_activation="silu", sparsity_24=None, dense_steps=0,
    sparsity_method="magnitude", sparsity_gradient="masked", sparsity_backward="dense", sparsity_ffn_memory="fused",
    sparsity_scale=1.0, sparsity_implementation="auto", tensor_model_parallel_size=2, sequence_parallel=True,
    recompute_granularity="full", init_method_std=0.01,
)  # fmt: skip
PATH = Path("theirs/iter_0000006")


def check(changes: dict, overrides: dict | None = None, weights_only: bool = False) -> None:
    arguments = argparse.Namespace(**{**SAVED, **changes})
    check_same_model(small(overrides or {}), arguments, PATH, weights_only)


def test_the_same_model_passes():
    check({})
    check(
        {"attention_backend": AttnBackend.flash, "tp_comm_overlap": True, "cuda_graph_impl": "local"}
    )  # how, not what
    check({"window_attn_skip_freq": 2, "rope_scaling_factor": 4.0})  # of a window and a scaling that are not there
    check({"group_query_attention": False, "num_query_groups": 2}, {"model.num_query_groups": 4})
    swiglu = {"swiglu": True, "squared_relu": False}
    check(swiglu, {"model.activation": "swiglu", "sparsity.kind": "none"})
    between = {"low_rank_kind": "cola", "low_rank_activation": "relu2", **swiglu}
    check(between, {"model.activation": "swiglu", "low_rank.kind": "cola", "low_rank.activation": "relu2"})
    check({"sparsity_gradient": "ste", "dense_steps": 7, "sparsity_scale": 3.0})  # as a resume takes them


NAMED = {  # an argument with a value of another model
    "layernorm_zero_centered_gamma": True, "normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True,
    "kv_channels": 24, "position_embedding_type": "learned_absolute", "rotary_percent": 0.5, "rotary_interleaved": True,
    "use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2, "no_rope_freq": [0, 1], "window_size": (8, 0),
    "softmax_type": "off-by-one", "softmax_scale": 0.3, "qk_layernorm": True, "qk_l2_norm": True, "qk_clip": True,
    "attention_dropout": 0.1, "hidden_dropout": 0.1, "fp8": "hybrid", "multi_latent_attention": True,
    "mtp_num_layers": 1, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0, "attention_output_gate": True,
    "fp32_residual_connection": True, "yaml_cfg": "a.yaml", "reset_attention_mask": True, "use_legacy_models": True,
    "heterogeneous_layers_config_path": "a.json", "is_hybrid_model": True, "experimental_attention_variant": "dsa",
    "spec": ["a", "b"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_elas_train_does_not_compute_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"^{name}=.*: Megatron-LM trained theirs/iter_0000006 with it, and") as said:
        check({name: NAMED[name]})
    assert "\n" not in str(said.value)
    if name in ("attention_dropout", "hidden_dropout", "qk_clip"):
        assert "--weights-only" in str(said.value)
        check({name: NAMED[name]}, weights_only=True)


OURS = [  # what Megatron-LM saved, what this configuration says, and the line
    ({"layernorm_epsilon": 1e-5}, {}, "model.norm_eps=1e-06: Megatron-LM trained {path} with 1e-05; set it to 1e-05"),
    ({}, {"model.norm_eps": 1e-3}, "model.norm_eps=0.001: .* 1e-06"),
    ({"num_layers": 2}, {}, "model.num_layers=4: .* with 2; set it to 2"),
    ({"ffn_hidden_size": 256}, {}, "model.ffn_hidden_size=128: .*set it to 256"),
    ({"group_query_attention": False}, {}, "model.num_query_groups=2: .*set it to 4"),
    ({"rotary_base": 500}, {}, "model.rotary_base=10000: .*set it to 500"),
    ({"untie_embeddings_and_output_weights": False}, {}, "model.tie_embeddings=False: .*set it to True"),
    ({"squared_relu": False}, {}, "model.activation='relu2': .*'gelu'; continue in Megatron-LM"),
    (
        {"squared_relu": False, "quick_geglu": True},
        {},
        "model.activation='relu2': .*'quick_geglu'; continue in Megatron-LM",
    ),
    ({"squared_relu": False, "swiglu": True}, {}, "model.activation='relu2': .*set it to swiglu"),
    ({"bf16": True}, {}, "train.dtype='float32': .*set it to bfloat16, or add --weights-only"),
    ({"fp16": True}, {}, "train.dtype='float32': .*'float16'; continue in Megatron-LM, or add --weights-only"),
    ({"num_experts": 4}, {}, "num_moe_experts=4: .*continue in Megatron-LM"),
    ({"te_precision_config_file": "a.yaml"}, {}, "quant_recipe='a.yaml': "),
    ({"low_rank_kind": "cola"}, {}, "low_rank.activation='silu'|low_rank.kind='lowrank': .*set it to cola"),
    ({"low_rank_rank": 8}, {}, "low_rank.rank=16: .*set it to 8"),
    ({"sparsity_24": False}, {}, "sparsity.kind='2:4': .* with 'none'; set it to none"),
    ({}, {"sparsity.kind": "none"}, "sparsity.kind='none': .* with '2:4'; set it to 2:4"),
    ({"sparsity_method": "soft_threshold"}, {}, "sparsity.method='magnitude': .*set it to soft_threshold"),
    (
        {"sparsity_method": "soft_threshold", "sparsity_scale": 2.0},
        {"sparsity.method": "soft_threshold"},
        "sparsity.scale=1.0: .*set it to 2.0",
    ),
]


@pytest.mark.parametrize(("changes", "overrides", "message"), OURS, ids=[line[:40] for _, _, line in OURS])
def test_settings_of_ours_are_compared(changes, overrides, message):
    with pytest.raises(ConfigError, match=message.format(path=PATH)) as said:
        check(changes, overrides)
    assert "\n" not in str(said.value) and ";" in str(said.value)


def test_epsilon_is_read_by_either_name():
    older = {key: value for key, value in SAVED.items() if key != "layernorm_epsilon"} | {"norm_epsilon": 1e-5}
    with pytest.raises(ConfigError, match=r"^model\.norm_eps=1e-06: "):
        check_same_model(small({}), argparse.Namespace(**older), PATH, False)


def test_what_is_not_saved_or_may_differ_is_said():
    bare = argparse.Namespace(**{key: SAVED[key] for key in ("num_layers", "swiglu", "squared_relu")})
    check_same_model(small({}), bare, PATH, False)
    (line,) = notes(small({}), bare)
    assert "model.norm_eps" in line and "sparsity" in line and "model.num_layers" not in line
    assert list(notes(small({}), argparse.Namespace(**SAVED))) == []
    (line,) = notes(small({}), argparse.Namespace(**{**SAVED, "dense_steps": 4}))
    assert line == "sparsity.dense_steps=0 from now on; Megatron-LM trained with 4"


def test_no_field_escapes():
    """Every field that changes values has a value that `elas train` computes, and every argument of GPTModel one."""
    fields = {field.name for field in dataclasses.fields(ElasTransformerConfig)}
    assert set(FIELDS) <= fields and set(REFUSED) > HOW_ONLY
    assert set(FIELDS) | set(OF_GPT_MODEL) <= set(computed(small({})))
    assert set(SAVED) - set(NAMED) - set(KEYS) - set(saved(small({}))) <= {
        "quick_geglu", "openai_gelu", "rope_scaling_factor", "fp16", "te_precision_config_file", "attention_backend",
        "tensor_model_parallel_size", "sequence_parallel", "recompute_granularity", "init_method_std",
        "window_attn_skip_freq",
    }  # fmt: skip
    compared = {"position_embedding_type", "rotary_percent", "rotary_base", "share_embeddings_and_output_weights",
                "rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor", "mtp_block_spec",
                "vocab_size"}  # fmt: skip
    how = {"self", "config", "transformer_layer_spec", "max_sequence_length", "pre_process", "post_process",
           "fp16_lm_cross_entropy", "parallel_output", "scatter_embedding_sequence_parallel", "pg_collection",
           "vp_stage"}  # fmt: skip
    assert set(inspect.signature(GPTModel.__init__).parameters) == compared | how


def test_what_is_exported_is_what_is_compared():
    for overrides in ({}, {"model.norm_eps": 1e-4, "train.dtype": "bfloat16"}, {"low_rank.kind": "none"}):
        config = small(overrides)
        held = argparse.Namespace(**saved(config))
        check_same_model(config, held, PATH, False)
        assert list(notes(config, held)) == [] and held.layernorm_epsilon == config.model.norm_eps
    said = flags(small({"model.norm_eps": 1e-4, "sparsity.dense_steps": 3, "sparsity.method": "soft_threshold"}))
    for words in ("--norm-epsilon 0.0001", "--normalization RMSNorm", "--disable-bias-linear", "--rank 16",
                  "--group-query-attention --num-query-groups 2", "--squared-relu", "--dense-steps 3",
                  "--sparsity-method soft_threshold", "--attention-dropout 0", "--position-embedding-type rope",
                  "--untie-embeddings-and-output-weights"):  # fmt: skip
        assert words in said
    assert "--no-sparsity-24" in flags(small({"sparsity.kind": "none"}))
