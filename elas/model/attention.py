"""Attention without an s × s matrix, and without a mixed QKV tensor when Q, K and V come from factor pairs.

Legend: s sequence, b batch, np query heads on this rank, ng key/value heads on this rank, hn head dimension.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from elas.model.low_rank import LowRankColumnParallelLinear


class SdpaCoreAttention(MegatronModule):
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention` (flash on CPU and GPU).

    Takes the arguments of Megatron-core's core-attention protocol; serves causal masks only.

    Raises:
        ValueError: another mask, a bias, or packed sequences.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_unused):
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"SdpaCoreAttention is causal self-attention; got {attn_mask_type} {attention_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """`query [s, b, np, hn]`, `key` and `value [s, b, ng, hn]` to `[s, b, np·hn]`."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaCoreAttention takes no mask, bias or packed sequences: it is causal by itself")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:  # on CPU, SDPA's own grouping falls back to the s × s form
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class ElasSelfAttention(SelfAttention):
    """Megatron's self-attention; with low-rank QKV, takes q, k and v from their pairs instead of splitting a copy."""

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True):
        """`hidden_states [s, b, h]` to query `[s, b, np, hn]`, key and value `[s, b, ng, hn]`."""
        if not isinstance(self.linear_qkv, LowRankColumnParallelLinear):
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        parts = self.linear_qkv.expand(self.linear_qkv.bottleneck(hidden_states))
        query, key, value = (x.view(*x.shape[:-1], -1, self.hidden_size_per_attention_head) for x in parts)
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return query, key, value
