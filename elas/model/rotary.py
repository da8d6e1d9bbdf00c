"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in few passes over q and k.

Megatron-core's function, where no fused kernel of Transformer Engine is at hand, builds the rotated half by a negation
and a concatenation, and autograd repeats each step backward. `rotate` gives the same bits, in both directions, in five
operations, of which four are on halves.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)


class _Rotate(torch.autograd.Function):
    """`x [s, b, n, hn]`, `cos` and `sin [s, 1 or b, 1, d]` in its dtype, d ≤ hn even → the same shape, contiguous."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        d, half = cos.shape[-1], cos.shape[-1] // 2
        out = _scaled(x, cos)
        # Each product is rounded before it is added, as in Megatron-core; addcmul would round once.
        out[..., :half] -= x[..., half:d] * sin[..., :half]
        out[..., half:d] += x[..., :half] * sin[..., half:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        d, half = cos.shape[-1], cos.shape[-1] // 2
        dx = _scaled(dout, cos)
        dx[..., :half] += dout[..., half:d] * sin[..., half:]
        dx[..., half:d] -= dout[..., :half] * sin[..., :half]
        return dx, None, None


def _scaled(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """`x` times `cos`; its features after cos's last as they are."""
    d = cos.shape[-1]
    if d == x.shape[-1]:
        return x * cos
    out = x.clone(memory_format=torch.contiguous_format)
    out[..., :d] *= cos
    return out


def rotate(x: torch.Tensor, angles: torch.Tensor, config: Any, cp_group: Any = None) -> torch.Tensor:
    """Turn pairs of features `(i, i + d/2)` of every head by its position's angles.

    Args:
        x: query or key, `[s, b, n, hn]`.
        angles: `[s, 1, 1, d]` fp32, d ≤ hn, as Megatron-core's `RotaryEmbedding` gives them.
        config: Megatron's; with `apply_rope_fusion` or `rotary_interleaved`, its own function is called.
        cp_group: context-parallel group, for Megatron's function.

    Returns:
        `[s, b, n, hn]` in x's dtype.
    """
    scale = _yarn_get_concentration_factor_from_config(config)
    if config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention:
        return apply_rotary_pos_emb(x, angles, config=config, mscale=scale, cp_group=cp_group)
    return _Rotate.apply(x, *_cos_sin(angles, x.dtype, scale))


_last: tuple[torch.Tensor, tuple, tuple[torch.Tensor, torch.Tensor]] | None = None


def _cos_sin(angles: torch.Tensor, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in `dtype`. The last are kept: all layers of a step turn by the same angles."""
    global _last
    version = None if angles.is_inference() else angles._version
    # An address identifies the angles as long as they are held here; checkpointing gives a new tensor of the same data.
    key = (angles.data_ptr(), angles.shape, angles.stride(), version, dtype, scale)
    if _last is not None and _last[1] == key:
        return _last[2]
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be saved for a backward
        found = (torch.cos(angles) * scale).to(dtype), (torch.sin(angles) * scale).to(dtype)
    _last = (angles, key, found)
    return found
