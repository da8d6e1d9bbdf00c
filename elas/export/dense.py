"""A model with its factors multiplied out, as an architecture that transformers and inference servers know."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import ArceeConfig, LlamaConfig, PreTrainedConfig

from elas.errors import UserError
from elas.hf.configuration_elas import ElasConfig
from elas.plan.shapes import Shape

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "dtype",
)  # fmt: skip
_IN, _OUT = ".factor_in.weight", ".factor_out.weight"


def check_can_be_dense(config: ElasConfig) -> None:
    """Raise `UserError` for a model whose factors have a non-linearity between them."""
    if config.low_rank == "cola":
        raise UserError(
            "--form dense: low_rank.kind=cola has a non-linearity between the factors, so there is no product; "
            "use --form elas"
        )


def dense_config(config: ElasConfig) -> PreTrainedConfig:
    """The stock configuration: Arcee's for squared ReLU without a gate, Llama's for SwiGLU; 2:4 is in neither."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    fields |= {"attention_bias": False, "mlp_bias": False}
    if config.hidden_act == "relu2":
        return ArceeConfig(architectures=["ArceeForCausalLM"], hidden_act="relu2", **fields)
    return LlamaConfig(architectures=["LlamaForCausalLM"], hidden_act="silu", **fields)


def dense_shapes(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Shapes of the products, by the name of a linear's weight, and of everything else."""
    dense = {}
    for name, shape in shapes.items():
        if name.endswith(_OUT):
            inner = shapes[name.removesuffix(_OUT) + _IN]
            dense[name.removesuffix(_OUT) + ".weight"] = (shape[0], inner[1])
        elif not name.endswith(_IN):
            dense[name] = shape
    return dense


def multiply_out(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Products of factor pairs, computed in fp64 and rounded once, and everything else, in `dtype`.

    Args:
        tensors: by transformers' names, fp32; a linear's `factor_in` comes before its `factor_out`.
        dtype: of the result.
    """
    first: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name.endswith(_IN):
            first[name.removesuffix(_IN)] = tensor
        elif name.endswith(_OUT):
            linear = name.removesuffix(_OUT)
            yield linear + ".weight", (tensor.double() @ first.pop(linear).double()).to(dtype)
        else:
            yield name, tensor.to(dtype)
