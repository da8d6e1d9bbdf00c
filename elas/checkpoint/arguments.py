"""Compares Megatron-LM's saved arguments with our configuration: those that decide what a model computes.

They follow from `elas.model.features`: every field of `TransformerConfig` in `WORKS` or `REFUSED`, except those that
only decide how a step is run (`LAYOUT`, `HOW_ONLY`), and the options that Megatron-LM passes to `GPTModel` besides. A
field added to either table is compared without a change here. Checkpoints hold the names of Megatron-LM's arguments;
`_read` translates the few that differ from the fields' names.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from elas.checkpoint.identity import effective, typed
from elas.config import Config, LowRankConfig, SparsityConfig
from elas.errors import ConfigError
from elas.megatron.arguments import sections
from elas.model.check import DEFAULTS
from elas.model.features import ARGUMENTS_REFUSED, HOW_ONLY, REFUSED, WORKS
from elas.model.provider import ADOPTED
from elas.model.transformer_config import transformer_config

_LAYOUT = (
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel "
    "context_parallel_size pipeline_dtype num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
    "perform_initialization"
)
LAYOUT = set(_LAYOUT.split())
"""Fields that work and decide only where a model lies or how it is initialised."""
# Compared as `activation` and `dtype`.
_SPELT_OTHERWISE = {"activation_func", "gated_linear_unit", "bf16", "fp16", "params_dtype"}
FIELDS = tuple(
    name
    for name in (*WORKS, *REFUSED)
    if name not in {*LAYOUT, *HOW_ONLY, *ADOPTED, *_SPELT_OTHERWISE} and "init_method" not in name
)
"""Fields that are compared."""
OF_GPT_MODEL = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": False,  # without it, `rope_scaling_factor` has no effect
    "rotary_seq_len_interpolation_factor": None,
}
"""Arguments of `GPTModel` for which `elas train` supports a single value."""
KEYS = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "num_query_groups": "model.num_query_groups",
    "activation": "model.activation",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "layernorm_epsilon": "model.norm_eps",
    "rotary_base": "model.rotary_base",
    "tie_embeddings": "model.tie_embeddings",
    "dtype": "train.dtype",
}
"""Arguments that a setting of ours determines, with its key."""
TRAINING = {"dtype", "hidden_dropout", "attention_dropout", "qk_clip"}
"""Arguments that affect training only; they are not compared with `--weights-only`."""


def computed(config: Config) -> dict[str, object]:
    """What `elas train` computes, by the names of Megatron-LM's saved arguments and of `KEYS`."""
    mine, model = transformer_config(config), config.model
    return {
        **{name: getattr(mine, name, DEFAULTS.get(name)) for name in FIELDS},
        **OF_GPT_MODEL,
        **dict.fromkeys(ARGUMENTS_REFUSED),
        "activation": model.activation,
        "rotary_base": model.rotary_base,
        "tie_embeddings": model.tie_embeddings,
        "dtype": config.train.dtype,
    }


def saved(config: Config) -> dict[str, object]:
    """The arguments that Megatron-LM would save for a configuration's model."""
    found = computed(config)
    activation, dtype = found.pop("activation"), found.pop("dtype")
    groups = found["num_query_groups"]
    low_rank, sparsity = config.low_rank, config.sparsity
    found |= {
        "num_experts": found.pop("num_moe_experts"),
        "group_query_attention": groups != found["num_attention_heads"],
        "swiglu": activation == "swiglu",
        "squared_relu": activation == "relu2",
        "bf16": dtype == "bfloat16",
        "untie_embeddings_and_output_weights": not found.pop("tie_embeddings"),
        "add_position_embedding": True,
        "padded_vocab_size": config.model.vocab_size,
        "seq_length": config.model.seq_length,
        "max_position_embeddings": config.model.max_position_embeddings or config.model.seq_length,
        "low_rank_kind": low_rank.kind,
        "low_rank_rank": low_rank.rank,
        "low_rank_activation": low_rank.activation,
        "sparsity_24": sparsity.kind == "2:4",
        "dense_steps": sparsity.dense_steps,
    }
    names = ("method", "gradient", "backward", "ffn_memory", "scale", "implementation")
    return found | {f"sparsity_{name}": getattr(sparsity, name) for name in names}


def _read(arguments: argparse.Namespace) -> dict[str, object]:
    """Saved arguments by the names that `computed` uses."""
    there = dict(vars(arguments))
    if "norm_epsilon" in there:  # the option's name, which other versions save
        there.setdefault("layernorm_epsilon", there["norm_epsilon"])
    if "num_experts" in there:
        there["num_moe_experts"] = there["num_experts"]
    there["quant_recipe"] = next((there[key] for key in _QUANTIZED if there.get(key) is not None), None)
    if not there.get("group_query_attention"):  # then Megatron-LM ignores num_query_groups
        there["num_query_groups"] = there.get("num_attention_heads")
    if there["num_query_groups"] is None:
        del there["num_query_groups"]
    if there.get("window_size") is None:
        there["window_attn_skip_freq"] = None  # no effect without a window
    if "untie_embeddings_and_output_weights" in there:
        there["tie_embeddings"] = not there["untie_embeddings_and_output_weights"]
    if "swiglu" in there or "squared_relu" in there:
        there["activation"] = _activation(there)
    if "bf16" in there or "fp16" in there:
        there["dtype"] = "bfloat16" if there.get("bf16") else "float16" if there.get("fp16") else "float32"
    return there


_QUANTIZED = ("te_precision_config_file", "kitchen_config_file", "kitchen_recipe_number")


def _activation(there: dict) -> str:
    kinds = {"swiglu": "swiglu", "squared_relu": "relu2", "quick_geglu": "quick_geglu", "openai_gelu": "openai_gelu"}
    return next((kind for name, kind in kinds.items() if there.get(name)), "gelu")


def check_same_model(config: Config, arguments: argparse.Namespace, path: Path, weights_only: bool) -> None:
    """Check that Megatron-LM trained the model that a configuration describes.

    Args:
        config: ours.
        arguments: Megatron-LM's saved arguments; missing ones are not compared (`notes` reports them).
        path: the checkpoint, for messages.
        weights_only: do not compare arguments that affect training only.

    Raises:
        ConfigError: the first argument that differs.
    """
    there = _read(arguments)
    for name, mine in computed(config).items():
        theirs = there.get(name)
        if name not in there or (weights_only and name in TRAINING) or _same(mine, theirs):
            continue
        weights = ", or add --weights-only to import only the weights" if name in TRAINING else ""
        if name not in KEYS:
            why = f"Megatron-LM trained {path} with it, and elas train supports only {mine!r}"
            raise ConfigError(name, theirs, why, f"continue in Megatron-LM{weights}")
        why = f"Megatron-LM trained {path} with {theirs!r}"
        raise ConfigError(KEYS[name], _shown(config, KEYS[name], mine), why, f"{_fix(name, theirs)}{weights}")
    _check_sections(config, arguments, path)


def _shown(config: Config, key: str, mine: object) -> object:
    given = typed(config, key)
    return mine if given is None else given


def _fix(name: str, theirs: object) -> str:
    choices = {"activation": ("swiglu", "relu2"), "dtype": ("float32", "bfloat16")}.get(name)
    return f"set it to {theirs}" if choices is None or theirs in choices else "continue in Megatron-LM"


def _same(mine: object, theirs: object) -> bool:
    return mine == theirs or not (mine or theirs)  # None, False and 0 mean the same


def _check_sections(config: Config, arguments: argparse.Namespace, path: Path) -> None:
    """Low rank and sparsity, as a resume compares them (`elas.checkpoint.identity`)."""
    theirs = _sections(config, arguments)
    here, there = effective(config), effective(theirs)
    for key in sorted({*here, *there}):
        if key.startswith(("low_rank.", "sparsity.")) and here.get(key) != there.get(key):
            value = typed(theirs, key)
            why = f"Megatron-LM trained {path} with {value!r}"
            raise ConfigError(key, typed(config, key), why, f"set it to {value}")


def _sections(config: Config, arguments: argparse.Namespace) -> Config:
    """Our configuration, with `low_rank` and `sparsity` replaced by what the saved arguments hold of them."""
    if not hasattr(arguments, "sparsity_method"):  # not by `elas.megatron.extra_args_provider`
        given = {field.name: getattr(arguments, f"low_rank_{field.name}", None) for field in _LOW_RANK}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(config, low_rank=dataclasses.replace(config.low_rank, **given))
    low_rank, sparsity = sections(arguments)
    return dataclasses.replace(config, low_rank=low_rank, sparsity=sparsity)


_LOW_RANK = dataclasses.fields(LowRankConfig)


def notes(config: Config, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines for the console: settings that the saved arguments lack, and changes in how 2:4 is trained."""
    there, held = _read(arguments), vars(arguments)
    keys = [key for name, key in KEYS.items() if there.get(name) is None]
    keys += [] if "low_rank_kind" in held else ["low_rank"]
    keys += [] if "sparsity_method" in held else ["sparsity"]
    if keys:
        yield f"Megatron-LM's arguments lack {', '.join(keys)}: taken from this configuration"
    theirs = _sections(config, arguments)
    if config.sparsity.kind == "2:4":
        for key in ("sparsity.dense_steps", "sparsity.gradient", "sparsity.backward"):
            mine, before = typed(config, key), typed(theirs, key)
            if mine != before:
                yield f"{key}={mine!r} from now on; Megatron-LM trained with {before!r}"


def flags(config: Config) -> str:
    """The command-line options with which Megatron-LM and `elas.megatron.elas_builder` compute the same."""
    held, low_rank = saved(config), config.low_rank
    named = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
             "max_position_embeddings", "position_embedding_type", "rotary_base", "normalization", "hidden_dropout",
             "attention_dropout")  # fmt: skip
    words = [f"--{name.replace('_', '-')} {held[name]}" for name in named]
    words += [f"--norm-epsilon {held['layernorm_epsilon']}", "--disable-bias-linear"]
    if held["group_query_attention"]:
        words.append(f"--group-query-attention --num-query-groups {held['num_query_groups']}")
    words.append("--swiglu" if held["swiglu"] else "--squared-relu")
    if held["untie_embeddings_and_output_weights"]:
        words.append("--untie-embeddings-and-output-weights")
    if held["bf16"]:
        words.append("--bf16")
    words.append(f"--low-rank {low_rank.kind}")
    if low_rank.kind != "none":
        words.append(f"--rank {low_rank.rank}")
    if low_rank.kind == "cola":
        words.append(f"--low-rank-activation {low_rank.activation}")
    return " ".join([*words, *_sparsity_flags(config)])


def _sparsity_flags(config: Config) -> Iterator[str]:
    sparsity, default = config.sparsity, SparsityConfig()
    if sparsity.kind != "2:4":
        if _relu2(config):
            yield "--no-sparsity-24"
        return
    if sparsity.dense_steps:
        yield f"--dense-steps {sparsity.dense_steps}"
    for name in ("method", "gradient", "backward", "scale"):
        if getattr(sparsity, name) != getattr(default, name):
            yield f"--sparsity-{name} {getattr(sparsity, name)}"


def _relu2(config: Config) -> bool:
    return config.model.activation == "relu2" or (
        config.low_rank.kind == "cola" and config.low_rank.activation == "relu2"
    )
