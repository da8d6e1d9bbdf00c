"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in few passes over q and k.

Megatron-core's function, where no fused kernel of Transformer Engine is at hand, builds the rotated half by a negation
and a concatenation, and autograd repeats each step backward. `rotate` gives the same bits, in both directions, with few
passes over memory: on a CPU block by block.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)

AT_ONCE = 2**18
"""Values of a block, so that what is computed in between stays in a processor's cache."""


class _Rotate(torch.autograd.Function):
    """`x [s, b, n, hn]`, `cos` and `sin [s, 1 or b, 1, d]` in its dtype, d ≤ hn even → the same shape, contiguous."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(torch.empty(x.shape, dtype=x.dtype, device=x.device), x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        back = torch.cat((-sin[..., half:], -sin[..., :half]), -1)  # as sin, for the transposed rotation
        return _turn(torch.empty(dout.shape, dtype=dout.dtype, device=dout.device), dout, cos, back), None, None


def _turn(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Write the rotated `x` into `out`, which may be x itself."""
    d, half = cos.shape[-1], cos.shape[-1] // 2
    step = len(x) if x.is_cuda else max(1, AT_ONCE * len(x) // max(1, x.numel()))
    for first in range(0, len(x), step):
        some = slice(first, first + step)
        to, of, c, s = out[some], x[some], cos[some], sin[some]
        # Each product is rounded before it is added, as in Megatron-core; addcmul would round once.
        for_first, for_second = of[..., half:d] * s[..., :half], of[..., :half] * s[..., half:]
        torch.mul(of[..., :d], c, out=to[..., :d])
        if out is not x and d < x.shape[-1]:
            to[..., d:] = of[..., d:]
        to[..., :half] -= for_first
        to[..., half:d] += for_second
    return out


def rotate(
    x: torch.Tensor, angles: torch.Tensor, config: Any, cp_group: Any = None, *, in_place: bool = False
) -> torch.Tensor:
    """Turn pairs of features `(i, i + d/2)` of every head by its position's angles.

    Args:
        x: query or key, `[s, b, n, hn]`.
        angles: `[s, 1, 1, d]` fp32, d ≤ hn, as Megatron-core's `RotaryEmbedding` gives them.
        config: Megatron's; with `apply_rope_fusion` or `rotary_interleaved`, its own function is called.
        cp_group: context-parallel group, for Megatron's function.
        in_place: x may be overwritten; only where no gradients are recorded.

    Returns:
        `[s, b, n, hn]` in x's dtype.
    """
    scale = _yarn_get_concentration_factor_from_config(config)
    if config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention:
        return apply_rotary_pos_emb(x, angles, config=config, mscale=scale, cp_group=cp_group)
    cos, sin = _cos_sin(angles, x.dtype, scale)
    return _turn(x, x, cos, sin) if in_place else _Rotate.apply(x, cos, sin)


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
