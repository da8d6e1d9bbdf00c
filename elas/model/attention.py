"""Attention without an s × s matrix, and without a mixed QKV tensor when Q, K and V come from factor pairs.

Legend: s sequence on this rank, b batch, np query heads on this rank, ng key/value heads on this rank, hn head
dimension, c context-parallel ranks.

Under context parallelism Megatron splits the sequence into 2c chunks and gives rank i the chunks i and 2c−1−i, which
balances the work under a causal mask. Keys and values of all ranks are gathered (their gradients are reduce-scattered),
and each of the two chunks of queries attends to the keys before it. `cp_comm_type` is ignored; the values are the same.
"""

import contextlib
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from elas.errors import UserError
from elas.model.check import check
from elas.model.low_rank import LowRankColumnParallelLinear
from elas.model.recompute import Again
from elas.model.rotary import rotate

_Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query `[s, b, np, hn]`, key and value `[s, b, ng, hn]`."""
_Angles = tuple[torch.Tensor | None, torch.Tensor | None]
"""Rotary angles of query and key, `[s, 1, 1, d]`."""


@lru_cache(maxsize=32)
def allowed(
    first_query: int, queries: int, keys: int, left: int | None, sink: bool, device: torch.device
) -> torch.Tensor:
    """The mask of keys that each query attends to: bool `[queries, keys]`, with `sink` one more column in front.

    Args:
        first_query: position of the first query; keys are at 0, 1, ….
        queries: number of queries.
        keys: number of keys.
        left: sliding window: how many positions back a query attends; None for no limit.
        sink: whether there is a key in front that every query attends to.
        device: of the mask.
    """
    q = torch.arange(first_query, first_query + queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None]
    mask = (k <= q) if left is None else (k <= q) & (k >= q - left)
    return F.pad(mask, (1, 0), value=True) if sink else mask


class SdpaCoreAttention(MegatronModule):
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention` (flash on CPU and GPU).

    Implements Megatron-core's core-attention protocol. Sliding windows, off-by-one softmax and context parallelism
    require a mask of queries × keys, shared by all heads; with attention dropout torch computes s × s scores on a CPU.

    Args:
        config: `attention_dropout`, `window_size`, `softmax_type`.
        layer_number: from 1, for `window_attn_skip_freq`.
        attn_mask_type: causal.
        attention_type: self.
        softmax_scale: None for 1/√hn.
        pg_collection: its `cp` is the context-parallel group; None takes Megatron's.
        cp_comm_type: ignored.

    Raises:
        UserError: not causal self-attention.
    """

    _causal: weakref.ref | None = None  # the last mask that was found to be causal, for all layers
    compute_again: Callable[[], _Heads] | None = None
    """Computes query, key and value of the next call again, which then does not keep them (`elas.model.recompute`)."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection=None,
        cp_comm_type: str | None = None,
    ):
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise UserError(
                f"SdpaCoreAttention is causal self-attention; got {attn_mask_type} {attention_type}: "
                "use Megatron's own layers for other kinds"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.sink = config.softmax_type == "off-by-one"
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.left = config.window_size[0] if windowed and config.window_size[0] >= 0 else None
        self.cp_group: Any = None  # a ProcessGroup; Megatron's annotations allow a number too
        if config.context_parallel_size > 1:
            self.cp_group = mpu.get_context_parallel_group() if pg_collection is None else pg_collection.cp

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
        """`query [s, b, np, hn]`, `key` and `value [s, b, ng, hn]` to `[s, b, np·hn]`.

        Args:
            query: see above.
            key: see above.
            value: see above.
            attention_mask: None, or Megatron's causal mask, which is checked and not used.
            attn_mask_type: Megatron's; causal.
            attention_bias: not supported.
            packed_seq_params: not supported.

        Raises:
            UserError: a mask that is not causal, a bias, or packed sequences.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError("attention supports neither a bias nor packed sequences (cu_seqlens): leave both out")
        chunks = self._query_chunks(query.shape[0], key.shape[0])
        if attention_mask is not None:
            self._check_mask(
                attention_mask, chunks, key.shape[0] * (1 if self.cp_group is None else self.cp_group.size())
            )
        q, k, v = _by_heads(query, *self._all_keys(key, value))
        kept = contextlib.nullcontext()
        if (compute := self.compute_again) is not None:
            again = Again(lambda: _by_heads(*compute()))
            again.drop(q, k, v)
            kept = again.hooks()
        with self._random_stream(), kept:
            outs = [self._attend(part, k, v, first) for part, (first, _) in zip(q.chunk(len(chunks), 2), chunks)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int) -> torch.Tensor:
        """Attention of queries `[b, np, n, hn]`, the first at position `first`, to the keys that are not after them."""
        n, dropout = q.shape[2], self.dropout if self.training else 0.0
        if self.left is None and not self.sink and (first == 0 or n == 1):
            k, v = k[:, :, : first + n], v[:, :, : first + n]
            return F.scaled_dot_product_attention(q, k, v, None, dropout, n > 1, scale=self.softmax_scale)
        keys = first + n
        mask = allowed(first, n, keys, self.left, self.sink, q.device)
        k, v = k[:, :, :keys], v[:, :, :keys]
        if self.sink:  # a key and a value of zeros, which add exp(0) to the denominator alone
            k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.softmax_scale)

    def _query_chunks(self, queries: int, keys: int) -> list[tuple[int, int]]:
        """First position and length of each chunk of queries; fewer queries than keys are the last positions."""
        if self.cp_group is None:
            return [(keys - queries, queries)]
        c, i, half = self.cp_group.size(), self.cp_group.rank(), queries // 2
        return [(i * half, half), ((2 * c - 1 - i) * half, half)]

    def _all_keys(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole sequence in order, `[s·c, b, ng, hn]`."""
        if self.cp_group is None:
            return key, value
        c = self.cp_group.size()
        both = torch.stack((key, value), dim=1)  # one collective for the two
        pieces = gather_from_sequence_parallel_region(
            both, tensor_parallel_output_grad=True, group=self.cp_group
        ).chunk(2 * c)
        ordered = torch.cat([pieces[2 * i] for i in range(c)] + [pieces[2 * i + 1] for i in reversed(range(c))])
        return ordered[:, 0], ordered[:, 1]

    def _random_stream(self):
        """The model-parallel random stream, for dropout, since each rank has its own heads."""
        tracker: Any = get_cuda_rng_tracker()
        if self.dropout and self.training and tracker.is_initialized():
            return tracker.fork()
        return contextlib.nullcontext()

    def _check_mask(self, mask: torch.Tensor, chunks: list[tuple[int, int]], keys: int) -> None:
        """Refuse a mask that is not causal (True: hidden). Each is checked once: a check waits for the GPU."""
        seen = SdpaCoreAttention._causal
        if seen is not None and seen() is mask:
            return
        own = torch.cat([allowed(first, n, keys, None, False, mask.device) for first, n in chunks])
        if mask.shape[-2:] != own.shape or mask.dtype != torch.bool or not bool((mask == ~own).all()):
            raise UserError(
                f"attention mask {list(mask.shape)}: only the causal mask is supported (no --reset-attention-mask); "
                "pass None, in Megatron-LM --no-create-attention-mask-in-dataloader"
            )
        SdpaCoreAttention._causal = weakref.ref(mask)


def _by_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> _Heads:
    """Views `[b, np, s, hn]`; grouped keys and values are repeated for the heads of their group."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if k.shape[1] != q.shape[1]:  # on a CPU, SDPA's own grouping computes s × s scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return q, k, v


class ElasSelfAttention(SelfAttention):
    """Megatron's self-attention; low-rank q, k and v come from their own pairs instead of being split from a copy.

    With `config.recompute_bottleneck` they are not kept for the backward pass, but computed again from the bottleneck
    (`elas.model.recompute`).
    """

    linear_qkv: Any  # Megatron's annotations are protocols without our attributes
    core_attention: Any

    def __init__(self, config, *args, **kwargs):
        check(config)
        super().__init__(config, *args, **kwargs)
        self._recomputes = config.recompute_bottleneck
        self._bottleneck: list[torch.Tensor] = []
        self._angles: _Angles | None = None  # of the call under way
        if self._recomputes:
            self.linear_qkv.remembers = True

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs):
        """Megatron's forward: `hidden_states [s, b, h]` (`[s/t, b, h]`) to the same shape, and the bias or None.

        `get_query_key_value_tensors` applies the rotary embedding, and Megatron's forward none, except with a cache of
        keys, of which it selects positions.
        """
        frequency: Any = self.config.no_rope_freq  # a list by now
        if any(kwargs.get(name) is not None for name in ("inference_context", "inference_params")):
            kwargs["rotary_pos_emb"] = rotary_pos_emb
        elif rotary_pos_emb is not None and not (frequency and frequency[self.layer_number - 1]):
            self._angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        if self._recomputes and torch.is_grad_enabled():
            bottleneck: list[torch.Tensor] = []  # of this call, from `get_query_key_value_tensors`
            self._bottleneck, angles = bottleneck, self._angles
            self.core_attention.compute_again = lambda: self._heads(
                self.linear_qkv(bottleneck[0], expand=True), angles, in_place=True
            )
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            self.core_attention.compute_again, self._bottleneck, self._angles = None, [], None

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True):
        """`hidden_states [s, b, h]` to query `[s, b, np, hn]`, key and value `[s, b, ng, hn]`, rotated."""
        if not isinstance(self.linear_qkv, LowRankColumnParallelLinear):
            found: Any = super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
            query, key, value = found
            return self._turned(query, key, value, self._angles)
        parts = self.linear_qkv(hidden_states, split=True)
        if (u := self.linear_qkv.recall()) is not None:
            self._bottleneck.append(u)
        return self._heads(parts, self._angles)

    def _heads(self, parts: tuple[torch.Tensor, ...], angles: _Angles | None, in_place: bool = False) -> _Heads:
        """Query, key and value as `Attention.forward` gives them to the core, from `linear_qkv`'s outputs."""
        query, key, value = (x.view(*x.shape[:-1], -1, self.hidden_size_per_attention_head) for x in parts)
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return self._turned(query, key, value, angles, in_place)

    def _turned(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: _Angles | None,
        in_place: bool = False,
    ) -> _Heads:
        for_query, for_key = angles or (None, None)
        if for_query is not None:
            query = rotate(query, for_query, self.config, self.pg_collection.cp, in_place=in_place)
        if for_key is not None:
            key = rotate(key, for_key, self.config, self.pg_collection.cp, in_place=in_place)
        return query, key, value
