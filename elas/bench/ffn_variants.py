"""The feed-forward layers that are compared, and their formulas.

Legend: n tokens, h hidden, f d_ff, r rank.

Every variant is an `elas.model.ffn.ElasFFN`, the module used in training. Squared-ReLU variants have the preset's d_ff,
gated ones two thirds of it, so that gate + up + down cost as much as up + down.

`elas_eager` is 2:4 as in research code: topk over the groups of relu², a scattered mask, and a straight-through
gradient (ste), all dense under autograd. `elas_compressed` and `elas_fused` compute the exact gradient (masked).
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from elas.config import load_config
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Implementation, Relu24Options, register, registry
from elas.model.ffn import ElasFFN
from elas.plan.counts import gated_width

TOPK = "topk"
DENSE: dict[str, object] = {"sparsity.kind": "none", "sparsity.ffn_memory": "eager"}
PRUNED: dict[str, object] = {"sparsity.kind": "2:4", "sparsity.dense_steps": 0, "sparsity.method": "magnitude"}
SWIGLU: dict[str, object] = {"model.activation": "swiglu", "sparsity.kind": "none"}


@dataclass(frozen=True)
class Variant:
    """One feed-forward layer.

    Args:
        overrides: configuration keys that replace the preset's; d_ff depends on `gated`.
        gated: SwiGLU rather than squared ReLU.
        gradient: of 2:4; None without 2:4.
        ffn_memory: memory mode of the kernel; None if no kernel runs.
        by: not our module, but its formula through torch.compile (`compile`) or Liger's SwiGLU kernel (`liger`).
    """

    overrides: dict[str, object] = field(default_factory=dict)
    gated: bool = False
    gradient: str | None = None
    ffn_memory: str | None = None
    by: str | None = None


VARIANTS = {
    "full_swiglu": Variant({"low_rank.kind": "none", **SWIGLU}, gated=True),
    "lowrank_swiglu": Variant(SWIGLU, gated=True),
    "lowrank_relu2": Variant(DENSE, ffn_memory="eager"),
    "elas_eager": Variant(
        {**PRUNED, "sparsity.ffn_memory": "eager", "sparsity.gradient": "ste", "sparsity.implementation": TOPK},
        gradient="ste",
        ffn_memory="eager",
    ),
    **{
        f"elas_{memory}": Variant(
            {**PRUNED, "sparsity.ffn_memory": memory, "sparsity.gradient": "masked"},
            gradient="masked",
            ffn_memory=memory,
        )
        for memory in ("compressed", "fused")
    },
}

COMPILED = {
    "full_swiglu_compiled": Variant({"low_rank.kind": "none", **SWIGLU}, gated=True, by="compile"),
    "lowrank_swiglu_compiled": Variant(SWIGLU, gated=True, by="compile"),
    "lowrank_relu2_compiled": Variant(DENSE, by="compile"),
    "full_swiglu_liger": Variant({"low_rank.kind": "none", **SWIGLU}, gated=True, by="liger"),
}
"""Peers on a GPU: the same weights and formulas, compiled by torch, or with Liger's kernel if that is installed."""
ON_REQUEST = {
    f"elas_fused_{name}": Variant(
        {**PRUNED, "sparsity.ffn_memory": "fused", "sparsity.gradient": "masked", "sparsity.implementation": name},
        gradient="masked",
        ffn_memory="fused",
    )
    for name in ("triton", "chunked", "torch")
}
"""`elas_fused` by an implementation that `auto` does not choose."""


class Peer(torch.nn.Module):
    """The weights of one of our layers in another implementation of its formula.

    Args:
        variant: has the formula.
        layer: has the weights.

    Raises:
        ConfigError: Liger is not installed.
    """

    def __init__(self, variant: Variant, layer: ElasFFN):
        super().__init__()
        self.layer = layer
        if variant.by == "liger":
            try:
                swiglu = importlib.import_module("liger_kernel.ops.swiglu")
            except ImportError as error:
                raise ConfigError(
                    "variants", "full_swiglu_liger", "Liger is not installed", "pip install liger-kernel"
                ) from error
            self._function = lambda weights, x: _liger(swiglu.LigerSiLUMulFunction.apply, weights, x)
        else:
            self._function = torch.compile(lambda weights, x: formula(variant, weights, x))

    def named_parameters(self, *args, **kwargs):
        """Names as in the layer."""
        return self.layer.named_parameters(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`x [n, 1, h]` to y of its shape, and no bias."""
        return self._function(dict(self.named_parameters()), x), None


def _liger(multiply: Any, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ weights["linear_fc1.weight"].T).chunk(2, -1)
    return multiply(gate.contiguous(), up.contiguous()) @ weights["linear_fc2.weight"].T


def build(variant: Variant, preset: str, dtype: str) -> Any:
    """The layer at a preset's shape with uninitialised weights; Megatron's process groups must exist.

    Raises:
        ConfigError: the preset and the variant do not go together.
    """
    from megatron.core.transformer.spec_utils import build_module

    from elas.config.rules import validate
    from elas.model.spec import ElasSpecProvider, layer_spec
    from elas.model.transformer_config import transformer_config

    shape = load_config(preset, {})
    values = {"low_rank.kind": "lowrank", "train.dtype": dtype, **variant.overrides}
    values |= {"model.activation": "swiglu" if variant.gated else "relu2"}
    values |= {"model.ffn_hidden_size": gated_width(shape) if variant.gated else shape.model.ffn_hidden_size}
    # A layer alone, timed and weighed without what the backward pass would compute again.
    config = load_config(preset, {**values, "train.recompute": "none"})
    validate(config, 1)
    provider = ElasSpecProvider(config.low_rank.kind != "none")
    submodules: Any = layer_spec(provider).submodules
    layer: Any = build_module(submodules.mlp, config=transformer_config(config))
    return layer if variant.by is None else Peer(variant, layer)


@torch.no_grad()
def fill(layer: ElasFFN | Peer, seed: int, *, ranked: bool) -> None:
    """Set the weights to normal values that keep activations near 1.

    Args:
        layer: from `build`.
        seed: of the values.
        ranked: make the four features of a group multiples of one vector, so that their order is unambiguous. With
            independent features some groups have near-ties, which fp64 and bf16 rank differently without being wrong,
            and which would dominate the error.
    """
    layer = layer.layer if isinstance(layer, Peer) else layer
    device = next(layer.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in layer.parameters():
        value = torch.randn(parameter.shape, generator=generator, device=device) / parameter.shape[-1] ** 0.5
        parameter.copy_(value)
    if ranked and not layer.gated:
        up = layer.linear_fc1.weight if layer.full_rank else layer.linear_fc1.factor_out
        up.copy_(_ranked(up.shape[0], up.shape[1], generator))


def _ranked(features: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """`[features, width]`: in each group of four rows a shuffle of one row times 1.4, 1, 0.6 and -1.2."""
    device = generator.device
    rows = torch.randn(features // 4, 1, width, generator=generator, device=device) / width**0.5
    order = torch.rand(features // 4, 4, generator=generator, device=device).argsort(-1)
    return (torch.tensor([1.4, 1.0, 0.6, -1.2], device=device)[order].unsqueeze(-1) * rows).flatten(0, 1)


def formula(variant: Variant, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The function of a variant, from plain products; shares no code with `elas.model` or the kernels.

    Args:
        variant: the variant.
        weights: by the module's parameter names.
        x: `[n, h]`.

    Returns:
        y `[n, h]`, differentiable; masks are constants.
    """
    up = _product(weights, "linear_fc1", x)
    if variant.gated:
        gate, up = up if len(up) == 2 else up[0].chunk(2, -1)
        s = gate / (1 + (-gate).exp()) * up
    else:
        s = up[0].clamp_min(0) ** 2
    if variant.gradient is not None:
        groups = s.detach().unflatten(-1, (-1, 4))
        keep = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0).flatten(-2)
        s = keep * s if variant.gradient == "masked" else s + (keep * s - s).detach()
    return _product(weights, "linear_fc2", s)[0]


def _product(weights: dict[str, torch.Tensor], linear: str, x: torch.Tensor) -> list[torch.Tensor]:
    """`x Wᵀ`, or each pair's `x factor_inᵀ factor_outᵀ`; pairs share a stacked `factor_in`."""
    if f"{linear}.weight" in weights:
        return [x @ weights[f"{linear}.weight"].T]
    outs = [w for name, w in weights.items() if name.startswith(f"{linear}.factor_out")]
    inner = (x @ weights[f"{linear}.factor_in"].T).chunk(len(outs), -1)
    return [u @ out.T for u, out in zip(inner, outs)]


class _TopkStraightThrough(torch.autograd.Function):
    """2:4 by topk, with a straight-through gradient."""

    @staticmethod
    def forward(ctx, a: torch.Tensor) -> torch.Tensor:
        groups = a.view(*a.shape[:-1], a.shape[-1] // 4, 4)
        mask = torch.zeros_like(groups).scatter_(-1, torch.topk(groups, 2, dim=-1).indices, 1.0)
        return (groups * mask).view_as(a)

    @staticmethod
    def backward(ctx, ds: torch.Tensor) -> torch.Tensor:
        return ds


def _topk_core(u: torch.Tensor, m_up: torch.Tensor, n_down: torch.Tensor, options: Relu24Options) -> torch.Tensor:
    a = F.relu(F.linear(u, m_up)) ** 2
    return F.linear(_TopkStraightThrough.apply(a), n_down)


@contextlib.contextmanager
def topk_registered() -> Iterator[None]:
    """A context in which `topk`, the eager 2:4 of research code, is in the kernel registry."""

    def serves(options: Relu24Options) -> str | None:
        wanted = options.sparse and options.method == "magnitude" and options.gradient == "ste"
        return None if wanted else "it supports magnitude with ste only"

    register(Implementation(TOPK, "eager", _topk_core, lambda device, dtype: None, priority=-1, supports=serves))
    try:
        yield
    finally:
        registry.unregister(TOPK, "eager")


def implementation(variant: Variant, layer: ElasFFN) -> str | None:
    """Name of the kernel implementation that this layer runs; None without a kernel.

    Raises:
        ConfigError: no implementation is available; the message says why.
    """
    if variant.by is not None:
        return variant.by
    if variant.ffn_memory is None:
        return None
    weight = next(layer.parameters())
    config = layer.config
    assert config.ffn_hidden_size is not None
    r = config.hidden_size if layer.full_rank else config.low_rank.rank
    widths = registry.Widths(r, config.ffn_hidden_size, r)
    return registry.select(layer.options, weight.device, weight.dtype, config.sparsity.implementation, widths).name
