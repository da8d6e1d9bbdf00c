"""A Hugging Face configuration as settings of ours, where our model computes the same."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import ArceeConfig, LlamaConfig, PreTrainedConfig

from elas.errors import ConfigError, UserError
from elas.hf.configuration_elas import ElasConfig
from elas.hf.model_type import model_type

_KINDS: dict[str, tuple[type[PreTrainedConfig], str, str]] = {
    "elas": (ElasConfig, "ElasForCausalLM", ""),
    "llama": (LlamaConfig, "LlamaForCausalLM", "silu"),
    "arcee": (ArceeConfig, "ArceeForCausalLM", "relu2"),
}
"""By model_type: the class of its configuration, the architecture, and the only activation that we have of it."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Args:
        folder: of a model of `elas export hf`, in either form, or of any Llama or Arcee.

    Returns:
        Settings of ours by dotted key, with which our model computes the same from the same weights.

    Raises:
        UserError: no such file, another architecture, or something in it that our model does not compute.
    """
    kind = model_type(folder)
    if kind not in _KINDS:
        names = ", ".join(architecture for _, architecture, _ in _KINDS.values())
        raise UserError(f"{folder}: model_type={kind!r} cannot be imported; give a folder of {names}")
    cls, architecture, activation = _KINDS[kind]
    path = folder / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    _check_architecture(path, given, architecture)
    try:
        config = cls.from_dict(given)
        _check_computes(path, given, config, activation)
        return _settings(config)
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: is no configuration of {architecture} ({why}); copy it again from its source"
        ) from error


def _check_architecture(path: Path, given: dict, architecture: str) -> None:
    named = given.get("architectures")
    if named not in (None, [architecture]):
        raise UserError(f"{path}: architectures={named} cannot be imported; give a folder of {architecture}")


def _check_computes(path: Path, given: dict, config: PreTrainedConfig, activation: str) -> None:
    """Raise `UserError` for what our model does not compute."""
    rope = config.rope_parameters or {}
    head = config.hidden_size // config.num_attention_heads
    theta = rope.get("rope_theta")
    refused = [
        ("quantization_config", given.get("quantization_config"), None, "its weights are quantised"),
        ("hidden_act", config.hidden_act, activation or config.hidden_act, f"its FFN must have {activation}"),
        ("attention_bias", getattr(config, "attention_bias", False), False, "our linears have no biases"),
        ("mlp_bias", getattr(config, "mlp_bias", False), False, "our linears have no biases"),
        ("head_dim", config.head_dim, head, f"heads must be hidden_size / num_attention_heads = {head} wide"),
        ("rope_type", rope.get("rope_type"), "default", "rotary frequencies are not rescaled here"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)), 1.0,
         "all of a head is rotated here"),
        ("rope_theta", theta, _whole(theta), "must be a whole number from 1 on"),
        ("sliding_window", given.get("sliding_window"), None, "attention sees the whole sequence here"),
    ]  # fmt: skip
    for key, value, expected, why in refused:
        if value != expected:
            raise UserError(f"{path}: {key}={value!r} cannot be imported: {why}; give a model with {key}={expected}")


def _whole(value: object) -> object:
    """The value as a whole number from 1 on; 10000 for anything else."""
    return int(value) if isinstance(value, int | float) and value >= 1 and value == int(value) else 10000


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration that was checked."""
    groups = config.num_key_value_heads
    settings: dict[str, Any] = {
        "model.hidden_size": config.hidden_size,
        "model.num_layers": config.num_hidden_layers,
        "model.num_attention_heads": config.num_attention_heads,
        "model.num_query_groups": None if groups == config.num_attention_heads else groups,
        "model.ffn_hidden_size": config.intermediate_size,
        "model.activation": "swiglu" if config.hidden_act == "silu" else "relu2",
        "model.vocab_size": config.vocab_size,
        "model.max_position_embeddings": config.max_position_embeddings,
        "model.tie_embeddings": bool(config.tie_word_embeddings),
        "model.norm_eps": config.rms_norm_eps,
        "model.rotary_base": int(config.rope_parameters["rope_theta"]),
        "model.init_std": config.initializer_range or 0.02,
        "low_rank.kind": "none",
        "sparsity.kind": "none",
    }
    if str(config.dtype).removeprefix("torch.") in ("float32", "bfloat16"):
        settings["train.dtype"] = str(config.dtype).removeprefix("torch.")
    if not isinstance(config, ElasConfig):
        return settings
    settings |= {"low_rank.kind": config.low_rank}
    if config.low_rank != "none":
        settings |= {"low_rank.rank": config.rank, "low_rank.activation": config.factor_act}
    settings |= {
        "sparsity.kind": config.sparsity,
        "sparsity.method": config.sparsity_method,
        "sparsity.gradient": config.sparsity_gradient,
        "sparsity.scale": float(config.sparsity_scale),
    }
    return settings | ({"sparsity.dense_steps": 0} if config.sparsity == "2:4" else {})


def choose_low_rank(
    folder: Path, kind: str | None, rank: int | None, given: dict[str, Any], source: dict[str, Any]
) -> dict[str, Any]:
    """How the run's linears are to be factored.

    Args:
        folder: that is imported, for messages.
        kind: value of `--low-rank`, which takes precedence over what is given; None without it.
        rank: likewise, of `--rank`.
        given: settings that the user gave, by dotted key.
        source: the folder's, from `read_settings`.

    Returns:
        `low_rank.kind` and, where there are factors, `low_rank.rank`.

    Raises:
        ConfigError: a kind that the folder's weights cannot be brought to, or one without a rank.
    """
    there, key = source["low_rank.kind"], "low_rank.rank"
    asked = given.get(key) if rank is None else rank
    wanted = kind or given.get("low_rank.kind") or (there if there != "none" or asked is None else "lowrank")
    if wanted != there and "cola" in (wanted, there):
        why = f"{folder} has low_rank.kind={there}, and CoLA's non-linearity between the factors has no product"
        raise ConfigError("low_rank.kind", wanted, why, f"leave it out, or set it to {there}")
    if wanted == "none":
        if rank is not None:
            raise ConfigError(key, rank, "with low_rank.kind=none there are no factors", "leave one out")
        return {"low_rank.kind": "none"}
    asked = source.get(key) if asked is None else asked
    if asked is None:
        raise ConfigError(key, None, "the weights are to be factored", "give --rank R")
    if wanted == "cola" and asked != source[key]:
        why = f"{folder} has {source[key]}, and CoLA's factors have no product to factor again"
        raise ConfigError(key, asked, why, "leave it out")
    return {"low_rank.kind": wanted, key: asked}
