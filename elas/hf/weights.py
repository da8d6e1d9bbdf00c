"""Our weights under transformers' names, and back.

    ours, in `decoder.layers.N.`                    transformers', in `model.layers.N.`
    self_attention.linear_qkv.factor_in [3r, h]     self_attn.{q,k,v}_proj.factor_in.weight [r, h]
    self_attention.linear_qkv.factor_out_q [o, r]   self_attn.q_proj.factor_out.weight
    self_attention.linear_qkv.weight, full rank     self_attn.{q,k,v}_proj.weight; ours stacks, for each key/value
                                                    head, its query heads, the key head and the value head
    mlp.linear_fc1.factor_in [2r, h], weight        mlp.{gate,up}_proj…, gate over up; only `up_proj` without a gate

Both rotate the first half of a head against the second (Megatron-core's default, not interleaved), so heads are as
they are. Legend: h hidden, r rank, o output width.
"""

import re
from collections.abc import Callable, Iterator

import torch

from elas.config import Config
from elas.plan.counts import key_value_width
from elas.plan.shapes import Shape, weight_shapes

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
_LINEARS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_PAIRS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}


def names_in_hf(name: str, config: Config) -> list[str]:
    """Names of the tensors that one of our weights becomes, in the order of `split`."""
    if name in _TOP:
        return [_TOP[name]]
    number, rest = _of_layer(name)
    prefix = f"model.layers.{number}."
    module, _, kind = rest.rpartition(".")
    if module in _NORMS:
        return [f"{prefix}{_NORMS[module]}.weight"]
    linears = _linears(module, config)
    if kind == "weight":
        return [f"{prefix}{linear}.weight" for linear in linears]
    factor, _, pair = kind.removeprefix("factor_").partition("_")
    if pair:
        linears = [linear for linear in linears if linear.endswith(_PAIRS[pair])]
    return [f"{prefix}{linear}.factor_{factor}.weight" for linear in linears]


def split(name: str, tensor: torch.Tensor, config: Config) -> dict[str, torch.Tensor]:
    """One of our weights as transformers' tensors; views where that is possible.

    Args:
        name: ours, as in `elas.plan.shapes.weight_shapes`.
        tensor: the whole weight.
        config: of the model.
    """
    names = names_in_hf(name, config)
    if len(names) == 1:
        return {names[0]: tensor}
    if not name.endswith("linear_qkv.weight"):
        return dict(zip(names, tensor.chunk(len(names))))
    groups, queries, head = _heads(config)
    mixed = tensor.view(groups, queries + 2, head, -1)
    parts = mixed[:, :-2], mixed[:, -2:-1], mixed[:, -1:]
    return {one: part.reshape(-1, tensor.shape[1]) for one, part in zip(names, parts)}


def join(name: str, read: Callable[[str], torch.Tensor], config: Config) -> torch.Tensor:
    """One of our weights, whole, from transformers' tensors: the inverse of `split`.

    Args:
        name: ours.
        read: gives a tensor by transformers' name.
        config: of the model.
    """
    names = names_in_hf(name, config)
    parts = [read(one) for one in names]
    if len(parts) == 1:
        return parts[0]
    if not name.endswith("linear_qkv.weight"):
        return torch.cat(parts)
    groups, _, head = _heads(config)
    return torch.cat([part.view(groups, -1, head, part.shape[1]) for part in parts], dim=1).flatten(0, 2)


def hf_shapes(config: Config) -> dict[str, Shape]:
    """Shape of each of transformers' tensors, in the order in which `split` gives them for all of our weights."""
    return {
        one: shape for name, whole in weight_shapes(config).items() for one, shape in _split_shape(name, whole, config)
    }


def _split_shape(name: str, shape: Shape, config: Config) -> Iterator[tuple[str, Shape]]:
    names = names_in_hf(name, config)
    if len(names) == 1:
        rows = [shape[0]]
    elif name.endswith("linear_qkv.weight"):
        rows = [config.model.hidden_size, key_value_width(config), key_value_width(config)]
    else:
        rows = [shape[0] // len(names)] * len(names)
    return ((one, (count, *shape[1:])) for one, count in zip(names, rows))


def _linears(module: str, config: Config) -> list[str]:
    gated = config.model.activation == "swiglu"
    return [linear for linear in _LINEARS[module] if gated or linear != "mlp.gate_proj"]


def _of_layer(name: str) -> tuple[int, str]:
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return int(match[1]), match[2]


def _heads(config: Config) -> tuple[int, int, int]:
    """Key/value heads, query heads for each of them, width of a head."""
    heads = config.model.num_attention_heads
    groups = config.model.num_query_groups or heads
    return groups, heads // groups, config.model.hidden_size // heads
