"""RMSNorm that knows sequence parallelism.

Megatron-core's `WrappedTorchNorm` refuses sequence parallelism. Under it, each tensor-parallel rank normalises its
own shard of the sequence, so the gradient of the (replicated) weight must be summed over the ranks. Megatron's
convention for that is an attribute `sequence_parallel` on the parameter, which `elas.train.grads` acts on.

torch's `rms_norm` keeps x and a number a row for its backward pass on CUDA. On CPU it is put together from small
operations, of which autograd keeps two fp32 tensors as large as x: 8 bytes a value in bf16, more than ELAS's FFN keeps.
There `LeanRMSNorm` keeps what CUDA does.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class LeanRMSNorm(torch.autograd.Function):
    """`rms_norm` keeping x and `1 / rms(x)`; computed in fp32 at least, as torch does."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x [..., h]`, `weight [h]` → `[..., h]` in the dtype of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """`dy [..., h]` → dx `[..., h]`, dweight `[h]`."""
        x, weight, scale = ctx.saved_tensors
        normal = x.to(scale.dtype) * scale
        wide = dy.to(scale.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = wide * weight
            dx = g.sub_(normal * (g * normal).mean(-1, keepdim=True)).mul_(scale).to(x.dtype)
        return dx, dweight, None


class RMSNorm(torch.nn.Module):
    """`x / rms(x) · weight` over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        config: gives the parameter dtype and whether the weight's gradient is a partial sum.
        hidden_size: length of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x [..., hidden_size]`; the result has its dtype."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return LeanRMSNorm.apply(x, self.weight, self.eps)
