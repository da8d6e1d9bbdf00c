"""The linears of a model for a token or two at a time, which read their weights faster, and fewer of them."""

import torch
from torch import nn

from elas.hf.modeling_elas import ElasForCausalLM, ElasMLP, LowRankLinear
from elas.kernels.relu2_24 import Relu24Options
from elas.kernels.relu2_24.few_tokens import live_rows, low_rank, serves


class FewTokensLinear(nn.Module):
    """A `LowRankLinear` without a non-linearity between its factors, whose weights it takes over; forward only."""

    def __init__(self, pair: LowRankLinear):
        super().__init__()
        self.factor_in, self.factor_out = pair.factor_in, pair.factor_out
        self.latent = pair.latent  # the value-latent cache asks for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [b, s, i]` to `[b, s, o]`."""
        y = low_rank(x.flatten(0, -2), self.factor_in.weight, self.factor_out.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


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
        self.factor_out, self.rest = None, nn.Identity()
        if isinstance(down, LowRankLinear):
            first = down.factor_in
            if down.kind == "lowrank":
                self.factor_out = down.factor_out.weight
            else:
                self.rest = nn.Sequential(down.act, down.factor_out)
        else:
            first = down
        self.down_t = nn.Parameter(first.weight.detach().t().contiguous(), requires_grad=False)
        first.register_parameter("weight", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [b, s, h]` to the same shape."""
        z = self.up_proj(x)
        y = live_rows(z.flatten(0, -2), self.down_t, self.options, self.factor_out)
        return self.rest(y).view(x.shape)


def prepare_for_few_tokens(model: nn.Module) -> bool:
    """Replace FFNs with squared ReLU, and low-rank linears; returns whether it did.

    It does not where there are no C++ products (on a GPU, or without a compiler), nor for other models than ours.
    """
    if not isinstance(model, ElasForCausalLM) or serves(model.device, model.dtype) is not None:
        return False
    if model.config.hidden_act == "relu2":
        for layer in model.model.layers:
            assert isinstance(layer.mlp, ElasMLP)
            layer.mlp = LiveRowsMLP(layer.mlp)
    if model.config.low_rank == "lowrank":
        pairs = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
        for module, name, child in pairs:
            if isinstance(child, LowRankLinear):
                setattr(module, name, FewTokensLinear(child))
    return True
