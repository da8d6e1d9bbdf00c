"""ELAS models for transformers: low-rank linears, squared ReLU, 2:4 sparsity of the activation (arXiv 2605.03667).

Legend: b batch, s tokens, n tokens with those in the cache, h hidden, f FFN, r rank, d head dimension.

A Llama-like decoder (RMSNorm, rotary positions, grouped queries, no biases) in which each linear is a pair of factors,
h → r → o, and the FFN is `down(prune(relu(up(x))²))`, where prune keeps the two largest of every four features.
"""

# Names are imported from where transformers' own models import them, though they are defined elsewhere.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elas import ElasConfig


class SquaredReLU(nn.Module):
    """`relu(x)²`, of whose features two in every four are kept if the model is 2:4 sparse.

    Of equal values the one with the lower index is kept. NaN ranks above everything, so that it is never hidden.
    """

    def __init__(self, config: ElasConfig):
        super().__init__()
        self.sparse = config.sparsity == "2:4"
        self.soft = config.sparsity_method == "soft_threshold"
        self.straight_through = config.sparsity_gradient == "ste"
        self.scale = float(config.sparsity_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., f]` to the same shape and dtype."""
        rho = x.relu()
        if not self.sparse:
            return rho.square()
        if not self.straight_through:
            return self.prune(rho)
        dense = (self.scale if self.soft else 1.0) * rho.square()
        return dense + (self.prune(rho.detach()) - dense).detach()

    def prune(self, rho: torch.Tensor) -> torch.Tensor:
        """`rho [..., f]`, not negative, to its square where kept, else 0."""
        wins = self.wins(rho.detach())
        if not self.soft:
            return torch.where(wins >= 2, rho.square(), 0)
        groups = rho.unflatten(-1, (-1, 4))
        third = torch.where(wins.unflatten(-1, (-1, 4)) == 1, groups, 0).sum(-1, keepdim=True)
        excess = (groups - third).flatten(-2)
        return self.scale * torch.where(wins >= 2, excess, 0).square()

    @staticmethod
    def wins(x: torch.Tensor) -> torch.Tensor:
        """How many of the three others of its four each feature of `x [..., f]` comes before: uint8 `[..., f]`."""
        a, b, c, d = torch.where(x.isnan(), torch.inf, x).unflatten(-1, (-1, 4)).unbind(-1)
        ab, ac, ad, bc, bd, cd = (won.to(torch.uint8) for won in (a >= b, a >= c, a >= d, b >= c, b >= d, c >= d))
        return torch.stack([ab + ac + ad, 1 - ab + bc + bd, 2 - ac - bc + cd, 3 - ad - bd - cd], dim=-1).flatten(-2)


class LowRankLinear(nn.Module):
    """`x · factor_inᵀ · factor_outᵀ`, with CoLA's non-linearity between the two."""

    def __init__(self, config: ElasConfig, in_features: int, out_features: int):
        super().__init__()
        self.kind = config.low_rank
        self.in_features, self.out_features = in_features, out_features
        self.factor_in = nn.Linear(in_features, config.rank, bias=False)
        self.factor_out = nn.Linear(config.rank, out_features, bias=False)
        self.act = nn.Identity()
        if config.low_rank == "cola":
            self.act = SquaredReLU(config) if config.factor_act == "relu2" else ACT2FN[config.factor_act]

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """The bottleneck: `x [..., i]` to `[..., r]`."""
        return self.act(self.factor_in(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., i]` to `[..., o]`."""
        return self.factor_out(self.latent(x))


def linear(config: ElasConfig, in_features: int, out_features: int) -> nn.Linear | LowRankLinear:
    """A linear of the model's kind, without a bias."""
    if config.low_rank == "none":
        return nn.Linear(in_features, out_features, bias=False)
    return LowRankLinear(config, in_features, out_features)


class ElasRMSNorm(nn.Module):
    """`x / rms(x) · weight` over the last dimension, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., h]` to the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class ElasRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions."""

    def __init__(self, config: ElasConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None  # transformers fills it
        self.rope_type = config.rope_parameters["rope_type"]
        make = self.compute_default_rope_parameters
        if self.rope_type != "default":
            make = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = make(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ElasConfig, **_kwargs) -> tuple[torch.Tensor, float]:
        """Frequencies `[d / 2]`, and the factor on cosines and sines."""
        assert config.head_dim is not None and config.rope_parameters is not None
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** steps, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[b, s, d]` in x's dtype, of `position_ids [b, s]`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = ((f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))
        return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head, `x [b, heads, s, d]`, by the angles of its position."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations; the others are transformers' own. Gives `[b, s, heads, d]` and the weights."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class ElasAttention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: ElasConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None and config.num_key_value_heads is not None  # ElasConfig fills them
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        heads, groups = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = linear(config, config.hidden_size, heads)
        self.k_proj = linear(config, config.hidden_size, groups)
        self.v_proj: Any = linear(config, config.hidden_size, groups)  # a latent cache uses LowRankLinear's parts
        self.o_proj = linear(config, heads, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states [b, s, h]` to the same shape, and the attention weights where they exist."""
        shape = hidden_states.shape[:-1]
        query, key = (
            rotate(project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2), *position_embeddings)
            for project in (self.q_proj, self.k_proj)
        )
        latent = past_key_values is not None and self.config.value_cache == "latent"
        if latent and self.config.low_rank == "none":
            raise ValueError("value_cache='latent' requires low-rank values; set config.value_cache to 'full'")
        if latent:
            value = self.v_proj.latent(hidden_states).unsqueeze(1)  # one head of width r
        else:
            value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # Many queries: expanding all values once costs less than attending to r. Other kernels have masks of their own.
        if latent and (query.shape[2] > 1 or self.config._attn_implementation not in ("eager", "sdpa")):
            value = self.v_proj.factor_out(value.squeeze(1)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            latent = False
        if latent:
            output, weights = self.attend_to_latent(query, key, value, attention_mask)
        else:
            chosen: Any = self.config._attn_implementation  # None, before a model has set it, is eager
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def attend_to_latent(
        self, query: torch.Tensor, key: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query: attend to the latent `[b, 1, n, r]`, then expand; exact, since the expansion is linear."""
        b, heads, _, _ = query.shape
        groups = key.shape[1]
        grouped = query.view(b, groups, heads // groups, self.head_dim)
        scores = (grouped @ key.transpose(2, 3)).view(b, heads, -1) * self.scaling
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, 0], torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask[:, :, 0]
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = (weights @ latent[:, 0]).view(b, groups, heads // groups, -1)
        expand = self.v_proj.factor_out.weight.view(groups, self.head_dim, -1)
        return (mixed @ expand.mT).view(b, 1, heads, self.head_dim), weights.unsqueeze(2)


class ElasMLP(nn.Module):
    """`down(prune(relu(up(x))²))`, or SwiGLU: `down(silu(gate(x)) · up(x))`."""

    def __init__(self, config: ElasConfig):
        super().__init__()
        self.gate_proj = None
        if config.hidden_act == "silu":
            self.gate_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)
        self.act_fn = SquaredReLU(config) if config.hidden_act == "relu2" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [b, s, h]` to the same shape."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ElasDecoderLayer(GradientCheckpointingLayer):
    """Attention and FFN, each after a norm and beside a residual."""

    def __init__(self, config: ElasConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ElasAttention(config, layer_idx)
        self.mlp = ElasMLP(config)
        self.input_layernorm = ElasRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ElasRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states [b, s, h]` to the same shape."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ElasPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config: ElasConfig
    config_class = ElasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ElasDecoderLayer, "attentions": ElasAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LowRankLinear):
            i, o, r = module.in_features, module.out_features, module.factor_in.out_features
            cola = ((i + o) * r) ** -0.25
            init.normal_(module.factor_in.weight, std=cola if module.kind == "cola" else (2 / (i + r)) ** 0.5)
            init.normal_(module.factor_out.weight, std=cola if module.kind == "cola" else (2 / (o + r)) ** 0.5)


class ElasModel(ElasPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: ElasConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ElasDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ElasRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = ElasRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,  # TransformersKwargs, without position_ids
    ) -> BaseModelOutputWithPast:
        """`input_ids [b, s]` or `inputs_embeds [b, s, h]` to the last hidden states `[b, s, h]` and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        hidden_states: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class ElasForCausalLM(ElasPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]  stock: lists

    def __init__(self, config: ElasConfig):
        super().__init__(config)
        self.model = ElasModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,  # TransformersKwargs, without position_ids
    ) -> CausalLMOutputWithPast:
        """Logits `[b, s, vocab]` of the last `logits_to_keep` tokens (0: all), and the loss if there are labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["ElasForCausalLM", "ElasModel", "ElasPreTrainedModel"]
