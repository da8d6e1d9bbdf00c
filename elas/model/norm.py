"""RMSNorm that knows sequence parallelism.

Megatron-core's `WrappedTorchNorm` refuses sequence parallelism. Under it, each tensor-parallel rank normalises its
own shard of the sequence, so the gradient of the (replicated) weight must be summed over the ranks. Megatron's
convention for that is an attribute `sequence_parallel` on the parameter, which `elas.train.grads` acts on.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
