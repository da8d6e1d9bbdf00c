"""Checks, wherever specs and layers are made, that our layers compute what a `TransformerConfig` requests."""

import dataclasses

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.tensor_parallel.random import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from elas.errors import ConfigError
from elas.model.features import REFUSED

ACTIVATIONS = {"relu2": squared_relu, "swiglu": F.silu}


def _defaults() -> dict[str, object]:
    found = {}
    for field in dataclasses.fields(TransformerConfig):
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


DEFAULTS = _defaults()


def check(config: TransformerConfig) -> None:
    """Refuse a configuration that our layers would not follow.

    Args:
        config: an `ElasTransformerConfig`, which has set its `ffn_activation`.

    Raises:
        ConfigError: the first field that requests an unsupported feature.
    """
    for name, (why, fix) in REFUSED.items():
        value = getattr(config, name, DEFAULTS.get(name))
        if value != DEFAULTS.get(name) and value:  # None, False and 0 request nothing
            raise ConfigError(name, value, why, fix)
    for rule in (_attention, _norm, _rank, _groups_of_four, _recomputation):
        rule(config)


def ffn_activation_of(config: TransformerConfig, wanted: str | None) -> str:
    """The FFN's kind, `relu2` or `swiglu`, from Megatron's fields; checks that they agree with `wanted`, if given.

    Raises:
        ConfigError: another activation, or fields that contradict each other.
    """
    function, gated = config.activation_func, config.gated_linear_unit
    name = getattr(function, "__name__", str(function))
    asked = {(F.silu, True): "swiglu", (squared_relu, False): "relu2"}.get((function, gated))
    if wanted is not None:
        if gated != (wanted == "swiglu"):
            fix = "set it to True" if wanted == "swiglu" else "set it to False, or ffn_activation to swiglu"
            kind = "gated" if wanted == "swiglu" else "not gated"
            raise ConfigError("gated_linear_unit", gated, f"ffn_activation={wanted} is {kind}", fix)
        if asked != wanted and function is not F.gelu:  # gelu is Megatron's default, so it requests nothing
            raise ConfigError(
                "activation_func", name, f"contradicts ffn_activation={wanted}", "leave one of the two out"
            )
        return wanted
    if asked is None:
        why = f"the FFN is a squared ReLU, or SwiGLU (gated_linear_unit={gated})"
        fix = "set it to megatron.core.activations.squared_relu (--squared-relu), or silu with a gate (--swiglu)"
        raise ConfigError("activation_func", name, why, fix)
    return asked


def _attention(config) -> None:
    if config.softmax_type not in ("vanilla", "off-by-one"):
        why = "a learnt offset is not supported"
        raise ConfigError("softmax_type", config.softmax_type, why, "use vanilla or off-by-one")
    if config.window_size is not None and config.window_size[1] > 0:
        why = "attention is causal, so a window extends to the left only"
        raise ConfigError("window_size", config.window_size, why, f"give ({config.window_size[0]}, 0)")
    tp = config.tensor_model_parallel_size
    if config.low_rank.kind != "none" and config.num_query_groups % tp:
        why = f"low-rank keys and values do not split over tensor_model_parallel_size={tp} ranks"
        raise ConfigError("num_query_groups", config.num_query_groups, why, f"give a multiple of {tp}, or fewer ranks")


def _norm(config) -> None:
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ConfigError("normalization", config.normalization, "unknown", "use RMSNorm or LayerNorm")


def _rank(config) -> None:
    if config.low_rank.kind == "none":
        return
    rank = config.low_rank.rank
    sizes = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels × num_query_groups": config.kv_channels * config.num_query_groups,
    }
    name, smallest = min(sizes.items(), key=lambda item: item[1])
    if not 1 <= rank <= smallest:
        why = f"is not between 1 and the smallest width that it factors ({name}, {smallest})"
        raise ConfigError("low_rank.rank", rank, why, f"give {smallest} or less")


def _recomputation(config) -> None:
    if getattr(config, "recompute_bottleneck", False):
        key, fix = "recompute_bottleneck", "leave it out; recompute_granularity=full computes whole layers again"
        if config.low_rank.kind == "none":
            raise ConfigError(key, True, "full rank has no bottleneck to compute from", fix)
        if config.context_parallel_size > 1:
            why = "keys are gathered over context-parallel ranks, and would be again in each backward pass"
            raise ConfigError(key, True, why, fix)
    chosen = config.recompute_modules or []
    if config.recompute_granularity == "selective" and "layernorm" in chosen and not HAVE_TE:
        why, fix = "Megatron-core recomputes norms with Transformer Engine only", "install it, or leave layernorm out"
        raise ConfigError("recompute_modules", chosen, why, fix)


def _groups_of_four(config) -> None:
    if config.sparsity.kind == "none":
        return
    steps = config.sparsity.dense_steps
    if isinstance(steps, float):
        raise ConfigError(
            "sparsity.dense_steps",
            steps,
            "is a share of a run, whose length is not known here",
            "give a number of steps",
        )
    between = config.low_rank.kind == "cola" and config.low_rank.activation == "relu2"
    if config.ffn_activation != "relu2" and not between:
        why = "2:4 sparsity requires a squared ReLU"
        fix = "set it to relu2 (--squared-relu), or sparsity.kind to none (--no-sparsity-24)"
        raise ConfigError("ffn_activation", config.ffn_activation, why, fix)
    tp = config.tensor_model_parallel_size
    if config.ffn_activation == "relu2" and config.ffn_hidden_size % (4 * tp):
        why = f"2:4 groups of four would straddle the {tp} tensor-parallel shards"
        raise ConfigError("ffn_hidden_size", config.ffn_hidden_size, why, f"give a multiple of {4 * tp}")
    if between and config.low_rank.rank % 4:
        raise ConfigError(
            "low_rank.rank", config.low_rank.rank, "does not split into groups of 4", "give a multiple of 4"
        )
