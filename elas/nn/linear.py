"""Low-rank linears in plain PyTorch: `y = (x · factor_inᵀ) · factor_outᵀ`.

Legend: i input width, o output width, r rank, n factor pairs.

Parameters have the names and shapes of `elas.model.low_rank` on one tensor-parallel rank: `factor_in [n·r, i]` and
`factor_out [o, r]`, or `factor_out_NAME [o, r]` for each of several pairs.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options
from elas.model.activation import Activation
from elas.model.core_call import Core, Pairs, with_bias
from elas.model.factor_std import factor_std
from elas.nn.settings import check_choice, check_parameters, check_size, sparsity_of

INITS = ("lowrank", "cola")
ACTIVATIONS = (None, "silu", "relu2")


def whole(u: Any) -> Tensor:
    """Reduce a DTensor's partial sums, and so those of its gradient, where they are r wide; other tensors unchanged."""
    tensor: Any = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    if tensor is None or not isinstance(u, tensor.DTensor):
        return u
    return u.redistribute(u.device_mesh, [one if one.is_shard() else tensor.Replicate() for one in u.placements])


class _Between(Activation):
    DENSE_STEPS = "dense_steps"


class LowRankLinear(Pairs, torch.nn.Module):
    """A linear layer as a pair of factors, or several that share their input.

    Args:
        in_features: i.
        out_features: o; or output widths by name, `{"q": 512, "k": 128, "v": 128}`, for a pair each; their
            `factor_in` are stacked, so that one product serves all pairs.
        rank: r, of each pair.
        bias: whether there is a `bias [o]`, or `bias_NAME` for each of several pairs.
        init: `lowrank`: normal with deviation sqrt(2 / (size + r)), as LORO; `cola`: as CoLA
            (`elas.model.factor_std`).
        activation: a non-linearity between the factors (CoLA, arXiv 2502.10940): `silu`, `relu2` (2:4 sparse unless
            options say otherwise) or any callable on `[..., n·r]`; None for none.
        options: of `relu2`; see `Relu24Options`.
        dense_steps: training steps before 2:4; requires `elas.nn.count_steps`.
        device: of the parameters, as in torch's layers.
        dtype: of the parameters: fp64, fp32, bf16 or, without `relu2`, fp16.

    Attributes:
        energy_kept: after `from_linear`, the share of the squared weights that the factors keep; else None.

    Raises:
        ConfigError: an invalid argument, or arguments that do not go together.
    """

    factor_in: torch.nn.Parameter
    factor_out: torch.nn.Parameter  # of a single pair
    bias: torch.nn.Parameter | None  # likewise

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        rank: int,
        bias: bool = False,
        init: str = "lowrank",
        activation: str | Callable[[Tensor], Tensor] | None = None,
        *,
        options: Relu24Options | None = None,
        dense_steps: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.rank = check_size("in_features", in_features), check_size("rank", rank)
        self.outputs = dict(out_features) if isinstance(out_features, Mapping) else {"out": out_features}
        if not self.outputs:
            raise ConfigError("out_features", out_features, "names no outputs", "give a width, or widths by name")
        for size in self.outputs.values():
            check_size("out_features", size)
        check_choice("init", init, INITS)
        check_parameters(bias, dtype, activation)
        self.init, self.energy_kept = init, None
        self.activation = self._activation(activation, options, dense_steps)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.factor_in = torch.nn.Parameter(torch.empty(len(self.outputs) * rank, in_features, **factory))
        for name, size in self.outputs.items():
            factor = torch.nn.Parameter(torch.empty(size, rank, **factory))
            self.register_parameter(self._name("factor_out", name), factor)
        for name, size in self.outputs.items():
            one = torch.nn.Parameter(torch.empty(size, **factory)) if bias else None
            self.register_parameter(self._name("bias", name), one)
        self.reset_parameters()

    def _activation(self, kind, options: Relu24Options | None, dense_steps: int) -> Callable | None:
        if callable(kind):
            kind, chosen = "callable", kind
        else:
            check_choice("activation", kind, ACTIVATIONS)
            chosen = None
        width = "rank", self.rank
        sparsity = sparsity_of(kind, options, dense_steps, width, "auto")
        return _Between(sparsity, kind) if kind in ("silu", "relu2") else chosen

    @property
    def out_features(self) -> int:
        """o, summed over pairs."""
        return sum(self.outputs.values())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the factors again from torch's default generator; biases become 0."""
        sizes = list(self.outputs.values())
        into = sum(sizes) // len(sizes)
        std = factor_std(self.init, self.rank, self.in_features, self.in_features, into)
        torch.nn.init.normal_(self.factor_in, 0.0, std)
        for size, factor, bias in zip(sizes, self.output_factors, self.biases):
            torch.nn.init.normal_(factor, 0.0, factor_std(self.init, self.rank, size, self.in_features, size))
            if bias is not None:
                torch.nn.init.zeros_(bias)
        if isinstance(self.activation, Activation):
            self.activation.reset_parameters()
        self.energy_kept = None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: torch.nn.Linear, rank: int, **more) -> "LowRankLinear":
        """The best rank-r approximation of a full-rank linear: truncated SVD, with √Σ in both factors.

        Args:
            linear: weight, bias, device, dtype and `requires_grad` are copied from it; it is not changed.
            rank: r, at most the smaller of its two widths.
            more: other arguments of `LowRankLinear`.

        Returns:
            The layer; its `energy_kept` is in 0 to 1.

        Raises:
            ConfigError: a rank that is too large, or not a `torch.nn.Linear`.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise ConfigError("linear", type(linear).__name__, "is not a torch.nn.Linear", "give one")
        most = min(linear.in_features, linear.out_features)
        if check_size("rank", rank) > most:
            raise ConfigError("rank", rank, f"the weight has rank {most} at most", f"give {most} or less")
        weight = linear.weight  # a frozen linear gives frozen factors
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        has_bias = linear.bias is not None
        one = cls(linear.in_features, linear.out_features, rank, **{"bias": has_bias, **factory, **more})
        one.train(linear.training)
        for factor in (one.factor_in, one.factor_out):
            factor.requires_grad_(weight.requires_grad)
        if has_bias and one.bias is not None:
            one.bias.requires_grad_(linear.bias.requires_grad)
        if weight.is_meta:
            return one
        u, sigma, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
        root = sigma[:rank].sqrt()
        one.factor_in.copy_(root[:, None] * vh[:rank])
        one.factor_out.copy_(u[:, :rank] * root)
        if has_bias and one.bias is not None:
            one.bias.copy_(linear.bias)
        total = float(sigma.square().sum())
        one.energy_kept = float(sigma[:rank].square().sum()) / total if total else 1.0
        return one

    @torch.no_grad()
    def to_linear(self) -> torch.nn.Linear:
        """A full-rank `nn.Linear` that computes the same: weight `factor_out · factor_in`.

        Raises:
            ConfigError: the layer has a non-linearity between its factors.
        """
        if self.activation is not None:
            raise ConfigError("activation", self.activation, "no single matrix computes this", "keep the factors")
        factor = self.factor_in
        biases: list[Tensor] = [one for one in self.biases if one is not None]
        linear: Any = torch.nn.utils.skip_init(
            torch.nn.Linear, self.in_features, self.out_features, bool(biases), device=factor.device, dtype=factor.dtype
        )
        pairs = zip(self.output_factors, factor.split(self.rank))
        linear.weight.copy_(torch.cat([out @ into for out, into in pairs]))
        linear.weight.requires_grad_(any(p.requires_grad for p in (factor, *self.output_factors)))
        if biases:
            linear.bias.copy_(torch.cat(biases))
            linear.bias.requires_grad_(any(one.requires_grad for one in biases))
        return linear.train(self.training)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Input side: `x [..., i]` to `u [..., n·r]`."""
        u = whole(F.linear(x, self.factor_in))
        return u if self.activation is None else self.activation(u)

    def expand(self, u: Tensor) -> tuple[Tensor, ...]:
        """Output side: `u [..., n·r]` to one `[..., o]` for each pair."""
        return tuple(F.linear(*one) for one in zip(u.split(self.rank, dim=-1), self.output_factors, self.biases))

    def project(self, x: Tensor) -> Tensor:
        """All outputs `[k, o]` of tokens `x [k, i]`, for the observer; only during a call."""
        return torch.cat(self.expand(self.bottleneck(x)), dim=-1)

    def forward(self, x: Tensor, *, core: Core | None = None, end: Core | None = None):
        """`x [..., i]` to `y [..., o]`; with several pairs to a tuple of one `[..., o]` for each.

        The FFN uses `core` and `end`: the layer passes a factor to them during its call, so that hooks on it run
        (`elas.model.core_call`).

        Args:
            x: the input, or that of `end`.
            core: called with `u [..., r]` and `factor_out [o, r]` (with a bias both are 8 wider); its result is
                returned.
            end: called with x and `factor_in [r, i]` instead of their product; returns `[..., r]`.
        """
        if core is not None:
            return core(*with_bias(self.bottleneck(x), self.factor_out, self.bias))
        if end is not None:
            v = whole(end(x, self.factor_in))
            return F.linear(v if self.activation is None else self.activation(v), self.factor_out, self.bias)
        y = self.expand(self.bottleneck(x))
        return y[0] if len(y) == 1 else y

    def extra_repr(self) -> str:
        """The text in `print(model)`."""
        outputs = self.outputs if len(self.outputs) > 1 else self.out_features
        return f"in_features={self.in_features}, out_features={outputs}, rank={self.rank}, bias={self.has_bias}"

    @property
    def has_bias(self) -> bool:
        """Whether outputs have a bias."""
        return self.biases[0] is not None
