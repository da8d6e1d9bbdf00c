"""The models whose decoding is compared, with random weights.

Legend: b batch, n tokens in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from elas.config import Config
from elas.export.dense import dense_config, multiply_out
from elas.generate.cache import growing_cache
from elas.generate.few_tokens import prepare_for_few_tokens
from elas.hf.build import hf_config
from elas.hf.modeling_elas import ElasForCausalLM

NAMES = ["hf_llama", "full_swiglu", "lowrank_relu2", "elas", "elas_latent", "dense_export"]


@dataclass(frozen=True)
class Variant:
    """A model and the cache it decodes with."""

    name: str
    model: PreTrainedModel
    cache: Callable[[], Cache]

    @property
    def weight_bytes(self) -> int:
        """Of what a token reads: all parameters but the embedding, of which it reads a row."""
        model: Any = self.model
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        sizes = {id(p): p.numel() * p.element_size() for p in self.model.parameters()}
        return sum(sizes.values()) - (0 if tied else sizes[id(embedding)])

    @property
    def kv_bytes_per_token(self) -> int:
        """In the cache, by one token's keys and values of all layers."""
        cache = self.cache()
        with torch.inference_mode():
            self.model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in _keys_and_values(cache) for t in pair)


def _keys_and_values(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`[b, heads, n, …]` of every layer."""
    layers: list[Any] = cache.layers  # all of softmax attention, which the annotation does not say
    return [(layer.keys, layer.values) for layer in layers]


def build(name: str, config: Config, context: int, dtype: torch.dtype) -> Variant:
    """One variant.

    Args:
        name: of `NAMES`.
        config: of the variant, from `elas.bench.step_models.variant_config`.
        context: longest sequence.
        dtype: of the weights.
    """
    shape = hf_config(config, step=int(config.sparsity.dense_steps) + 1, dtype=dtype)
    shape.max_position_embeddings = context
    torch.manual_seed(3)
    if name == "hf_llama":
        fields = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        same = {field: getattr(shape, field) for field in fields.split()}
        llama = LlamaConfig(**same, max_position_embeddings=context, tie_word_embeddings=shape.tie_word_embeddings)
        return Variant(name, _ready(LlamaForCausalLM(llama), dtype), lambda: DynamicCache(config=llama))
    model = _ready(ElasForCausalLM(shape), dtype)
    if name == "dense_export":
        stock = dense_config(shape)
        model = _dense(model, stock, dtype)
        return Variant(name, model, lambda: DynamicCache(config=stock))
    if name != "full_swiglu":
        prepare_for_few_tokens(model)
    if name == "elas_latent":
        model.config.value_cache = "latent"
    return Variant(name, model, growing_cache)


def _ready(model: Any, dtype: torch.dtype) -> Any:
    """In `dtype`, for inference; transformers' models lose their type in `to`."""
    return model.to(dtype).eval()


def _dense(model: ElasForCausalLM, stock, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    weights = dict(multiply_out(((name, p.detach()) for name, p in model.named_parameters()), dtype))
    made = AutoModelForCausalLM.from_config(stock).to(dtype)
    made.load_state_dict(weights, strict=not stock.tie_word_embeddings)
    made.tie_weights()
    return made.eval()


def filled(variant: Variant, batch: int, tokens: int) -> Cache:
    """A cache as after `tokens` tokens, of random numbers: what decoding costs does not depend on them."""
    cache = variant.cache()
    with torch.inference_mode():
        variant.model(input_ids=torch.ones(batch, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        for number, pair in enumerate(_keys_and_values(cache)):
            keys, values = (torch.randn((*t.shape[:2], tokens - 1, t.shape[3]), dtype=t.dtype) for t in pair)
            cache.update(keys, values, number)
    return cache
