"""RMSNorm and LayerNorm that support sequence parallelism.

Megatron-core's `WrappedTorchNorm` refuses sequence parallelism, in which each tensor-parallel rank normalises its own
shard of the sequence, so that the gradient of the replicated weight must be summed over ranks. As in Megatron, the
parameter has an attribute `sequence_parallel`, which `elas.engine.grads` reads.

On CUDA torch's `rms_norm` keeps x and one number per row for its backward pass. On a CPU it consists of small
operations for which autograd keeps two fp32 tensors as large as x: 8 bytes a value in bf16, more than ELAS's FFN keeps.
`LeanRMSNorm` keeps on a CPU what is kept on CUDA.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from elas import accelerator
from elas.errors import ConfigError
from elas.model.recompute import Remembers

AT_ONCE = 2**18
"""Values of a block of rows."""


class LeanRMSNorm(torch.autograd.Function):
    """`rms_norm` that keeps x and `1 / rms(x)`; computed in fp32 or wider, as in torch."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x [..., h]`, `weight [h]` → `[..., h]` in the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, out = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty((len(rows), 1), dtype=dtype, device=x.device)
        for some in _blocks(rows):
            wide = rows[some].to(dtype)
            scale[some] = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
            out.view(rows.shape)[some] = (wide * scale[some]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """`dy [..., h]` → dx `[..., h]`, dweight `[h]`."""
        x, weight, scale = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        rows, given = (one.reshape(-1, x.shape[-1]) for one in (x, dy))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if for_x else None
        dweight = torch.zeros(weight.shape, dtype=scale.dtype, device=x.device) if for_weight else None
        for some in _blocks(rows):
            normal, wide = rows[some].to(scale.dtype) * scale[some], given[some].to(scale.dtype)
            if dweight is not None:
                dweight += (wide * normal).sum(0)
            if dx is not None:
                g = wide * weight
                dx.view(rows.shape)[some] = g.sub_(normal * (g * normal).mean(-1, keepdim=True)).mul_(scale[some])
        return dx, None if dweight is None else dweight.to(weight.dtype), None


def _blocks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices of rows, so that what is computed of each stays in a processor's cache."""
    step = max(1, AT_ONCE // rows.shape[1])
    return (slice(first, first + step) for first in range(0, len(rows), step))


class _Norm(Remembers, torch.nn.Module):
    """A norm with a weight that has Megatron's attributes.

    Args:
        config: the parameter dtype, sequence parallelism, and whether the weight is stored as its difference from 1
            (`layernorm_zero_centered_gamma`).
        hidden_size: length of the last dimension.
        eps: added to the mean square or the variance.

    Raises:
        ConfigError: `config.normalization` is another norm.
    """

    kind: str

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        if config.normalization != self.kind:
            why = f"the layer's spec has {self.kind}"
            fix = "give the configuration to layer_spec or block_spec, or make the two agree"
            raise ConfigError("normalization", config.normalization, why, fix)
        self.eps = eps
        self.centre = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = self._parameter(config, hidden_size, 1.0 - self.centre)

    def _parameter(self, config: TransformerConfig, size: int, value: float) -> torch.nn.Parameter:
        device = "cpu" if config.use_cpu_initialization else accelerator.device()
        parameter: Any = torch.nn.Parameter(torch.full((size,), value, device=device, dtype=config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel
        parameter.init_value = value  # for `elas.model.init`
        return parameter

    def _scale(self) -> torch.Tensor:
        return self.weight + self.centre if self.centre else self.weight


class RMSNorm(_Norm):
    """`x / rms(x) · weight` over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467); see `_Norm`."""

    kind = "RMSNorm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x [..., hidden_size]`; the result has its dtype."""
        self.remember(x)
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self._scale(), self.eps)
        return LeanRMSNorm.apply(x, self._scale(), self.eps)


class LayerNorm(_Norm):
    """`(x − mean) / std · weight + bias` over the last dimension (Ba et al. 2016, arXiv 1607.06450); see `_Norm`."""

    kind = "LayerNorm"

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(config, hidden_size, eps)
        self.bias = self._parameter(config, hidden_size, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x [..., hidden_size]`; the result has its dtype."""
        self.remember(x)
        return F.layer_norm(x, self.weight.shape, self._scale(), self.bias, self.eps)
