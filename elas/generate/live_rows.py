"""The FFN of a squared-ReLU model for a token at a time: only rows of the down weight with a live feature are read."""

import torch
from torch import nn

from elas.hf.modeling_elas import ElasForCausalLM, ElasMLP, LowRankLinear
from elas.kernels.relu2_24 import Relu24Options
from elas.kernels.relu2_24.live_rows import live_rows, serves


class LiveRowsMLP(nn.Module):
    """An `ElasMLP` with squared ReLU whose down weight is kept transposed; forward only.

    Args:
        mlp: its weights are taken over, so that they are not in memory twice.
    """

    def __init__(self, mlp: ElasMLP):
        super().__init__()
        act = mlp.act_fn
        self.options = Relu24Options(
            sparse=act.sparse, method="soft_threshold" if act.soft else "magnitude", scale=act.scale
        )
        self.up_proj = mlp.up_proj
        down = mlp.down_proj
        first, self.rest = (down.factor_in, nn.Sequential(down.act, down.factor_out)) \
            if isinstance(down, LowRankLinear) else (down, nn.Identity())  # fmt: skip
        self.down_t = nn.Parameter(first.weight.detach().t().contiguous(), requires_grad=False)
        first.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [b, s, h]` to the same shape."""
        z = self.up_proj(x)
        return self.rest(live_rows(z.flatten(0, -2), self.down_t, self.options)).view(x.shape)


def read_live_rows_only(model: ElasForCausalLM) -> bool:
    """Replace the FFNs of a model where that helps; returns whether it did.

    It does not for SwiGLU, nor where there is no C++ product (on a GPU, or without a compiler).
    """
    if not isinstance(model, ElasForCausalLM) or model.config.hidden_act != "relu2":
        return False
    if serves(model.device, model.dtype) is not None:
        return False
    for layer in model.model.layers:
        layer.mlp = LiveRowsMLP(layer.mlp)
    return True
