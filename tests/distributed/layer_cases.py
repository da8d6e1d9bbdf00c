"""Layers alone on tensor-parallel ranks, beside the same layers written as formulas over the whole weights in fp64.

Legend: s sequence, b batch, h hidden, f d_ff, r rank, t tensor-parallel ranks, np heads, ng key/value heads, hn head
size.

`check_layers` runs on each rank. For each case it draws the whole weights, input and output gradient, gives the layer
its parts, and returns the errors of output, input gradient and every weight gradient against the formula. The formulas
share no code with `elas`: what they take from it is a parameter's name and along which dimension it is split.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

S, B, H, F, R, NP, NG = 16, 2, 64, 128, 8, 8, 4
HN = H // NP
ROTARY_BASE = 10000

Weights = dict[str, torch.Tensor]
LOWRANK, COLA, FULL = ({"low_rank.kind": kind} for kind in ("lowrank", "cola", "none"))
COLA_SPARSE = {**COLA, "low_rank.activation": "relu2", "sparsity.kind": "2:4"}
DENSE = {"sparsity.kind": "none"}
SWIGLU = {"model.activation": "swiglu", **DENSE}


@dataclass(frozen=True)
class Case:
    """One layer, and what it should compute.

    Args:
        overrides: configuration by dotted key.
        build: megatron config to layer.
        call: layer and its input to a list of outputs.
        reference: whole input, whole weights and megatron config to the list of whole outputs.
        width: input features.
        splits_input: input features are split over ranks, and outputs are sums over them.
        splits_output: output features are split over ranks.
        megatron: fields of Megatron's configuration.
    """

    overrides: dict
    build: Callable
    reference: Callable
    call: Callable = field(default=lambda layer, x: [_added(layer(x))])
    width: int = H
    splits_input: bool = False
    splits_output: bool = False
    megatron: dict = field(default_factory=dict)


def _added(output_and_bias: tuple) -> torch.Tensor:
    output, bias = output_and_bias
    return output if bias is None else output + bias


# ------------------------------------------------------------------------------------------------- formulas


def relu2(z: torch.Tensor, sparse: bool) -> torch.Tensor:
    """`relu(z)²`, and of every four consecutive features the two largest."""
    rho = z.clamp_min(0).unflatten(-1, (-1, 4))
    if sparse:
        rho = torch.zeros_like(rho).scatter(-1, rho.topk(2).indices, 1.0) * rho
    return rho.flatten(-2).square()


def between(z: torch.Tensor, config) -> torch.Tensor:
    """CoLA's non-linearity between the factors, or none."""
    if config.low_rank.kind != "cola":
        return z
    if config.low_rank.activation == "silu":
        return z * torch.sigmoid(z)
    return relu2(z, config.sparsity.kind == "2:4")


def pairs(x: torch.Tensor, w: Weights, config, prefix: str = "", names: tuple[str, ...] = ("",)) -> list[torch.Tensor]:
    """`factor_out · between(factor_in · x)` for each pair; pair i has rows i·r to (i+1)·r of `factor_in`."""
    factor_in = w[prefix + "factor_in"]
    outputs = []
    for i, name in enumerate(names):
        u = between(x @ factor_in[i * R : (i + 1) * R].T, config)
        outputs.append(u @ w[prefix + "factor_out" + name].T + w.get(prefix + "bias" + name, 0.0))
    return outputs


def ffn(x: torch.Tensor, w: Weights, config) -> list[torch.Tensor]:
    """down(nonlinearity(up(x))), gated or squared ReLU, full or low rank."""
    full_rank, gated = config.low_rank.kind == "none", config.ffn_activation == "swiglu"
    if full_rank:
        z = x @ w["linear_fc1.weight"].T + w.get("linear_fc1.bias", 0.0)
        parts = list(z.chunk(2, dim=-1)) if gated else [z]
    else:
        parts = pairs(x, w, config, "linear_fc1.", ("_gate", "_up") if gated else ("",))
    if gated:
        s = parts[0] * torch.sigmoid(parts[0]) * parts[1]
    else:
        s = relu2(parts[0], config.sparsity.kind == "2:4")
    if not full_rank:
        return pairs(s, w, config, "linear_fc2.")
    return [s @ w["linear_fc2.weight"].T + w.get("linear_fc2.bias", 0.0)]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions on `x [s, b, heads, hn]`: feature i and i + hn/2 turn by position · base^(-2i/hn)."""
    half = HN // 2
    angle = torch.arange(x.shape[0])[:, None] * ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) * 2 / HN)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x: torch.Tensor, w: Weights, config) -> list[torch.Tensor]:
    """Causal softmax attention with rotary positions, key/value heads shared by np/ng query heads each."""
    if config.low_rank.kind == "none":  # Megatron's weight: for each key/value head its queries, key and value
        mixed = (x @ w["linear_qkv.weight"].T + w.get("linear_qkv.bias", 0.0)).unflatten(-1, (NG, NP // NG + 2, HN))
        q, k, v = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    else:
        parts = pairs(x, w, config, "linear_qkv.", ("_q", "_k", "_v"))
        q, k, v = (part.unflatten(-1, (-1, HN)) for part in parts)
    if config.qk_layernorm:
        q, k = (rms_norm(z, {"weight": w[f"{n}_layernorm.weight"]}, config)[0] for z, n in ((q, "q"), (k, "k")))
    q, k = rotate(q), rotate(k)
    k, v = (z.repeat_interleave(NP // NG, dim=2) for z in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / HN**0.5
    weights = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf")).softmax(-1)
    out = torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)
    if config.low_rank.kind != "none":
        return pairs(out, w, config, "linear_proj.")
    return [out @ w["linear_proj.weight"].T + w.get("linear_proj.bias", 0.0)]


def rms_norm(x: torch.Tensor, w: Weights, config) -> list[torch.Tensor]:
    """`x / sqrt(mean(x²) + eps) · weight`."""
    return [x / (x.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * w["weight"]]


# ------------------------------------------------------------------------------------------------- the layers


def _column(outputs: dict[str, int] | None = None, place: str | None = None, size: int = F) -> Callable:
    def build(config):
        from elas.model.low_rank import LowRankColumnParallelLinear

        return LowRankColumnParallelLinear(H, size, config=config, outputs=outputs, tp_comm_buffer_name=place)

    return build


def _row(config):
    from elas.model.low_rank import LowRankRowParallelLinear

    return LowRankRowParallelLinear(F, H, config=config)


def _layer(name: str) -> Callable:
    def build(config):
        from megatron.core.transformer.spec_utils import build_module

        from elas.model.spec import ElasSpecProvider, layer_spec

        spec = getattr(layer_spec(ElasSpecProvider(config.low_rank.kind != "none"), config).submodules, name)
        return build_module(spec, config=config, **({"layer_number": 1} if name == "self_attention" else {}))

    return build


def _norm(config):
    from elas.model.norm import RMSNorm

    return RMSNorm(config, H, config.layernorm_epsilon)


def _attend(layer, x):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    angles = RotaryEmbedding(HN, 1.0, rotary_base=ROTARY_BASE)(S)
    return [_added(layer(x, None, rotary_pos_emb=angles))]


def _expand(layer, x):
    return layer.expand(layer.bottleneck(x))


def _plain_call(layer, x):
    return [_added(layer(x))]


BIASES, QK_NORM = {"add_bias_linear": True}, {"qk_layernorm": True}
QKV = {"q": H, "k": NG * HN, "v": NG * HN}


def _columns(overrides: dict, build: Callable, names: tuple[str, ...], call: Callable = _expand) -> Case:
    return Case(overrides, build, lambda x, w, c: pairs(x, w, c, names=names), call, splits_output=True)


CASES = {
    "column": _columns(LOWRANK, _column(), ("",)),
    "column, forward": _columns(LOWRANK, _column(), ("",), lambda layer, x: [layer(x)[0]]),
    "column, cola": _columns(COLA, _column(), ("",)),
    "column, cola relu2 2:4": _columns(COLA_SPARSE, _column(), ("",)),
    "qkv": _columns(LOWRANK, _column(None, "qkv", sum(QKV.values())), ("_q", "_k", "_v")),
    "gate and up": _columns({**LOWRANK, **SWIGLU}, _column(None, "fc1", 2 * F), ("_gate", "_up")),
    "pairs by name": _columns(LOWRANK, _column({"a": 32, "b": 64}, None, 96), ("_a", "_b")),
    "row": Case(LOWRANK, _row, pairs, width=F, splits_input=True),
    "row, cola": Case(COLA, _row, pairs, width=F, splits_input=True),
    "row, cola relu2 2:4": Case(COLA_SPARSE, _row, pairs, width=F, splits_input=True),
    "ffn swiglu": Case({**LOWRANK, **SWIGLU}, _layer("mlp"), ffn),
    "ffn relu2": Case({**LOWRANK, **DENSE}, _layer("mlp"), ffn),
    "ffn relu2 2:4": Case(LOWRANK, _layer("mlp"), ffn),
    "ffn relu2 2:4, eager": Case({**LOWRANK, "sparsity.ffn_memory": "eager"}, _layer("mlp"), ffn),
    "ffn swiglu, full rank": Case({**FULL, **SWIGLU}, _layer("mlp"), ffn),
    "ffn relu2, full rank": Case({**FULL, **DENSE}, _layer("mlp"), ffn),
    "ffn relu2 2:4, full rank": Case(FULL, _layer("mlp"), ffn),
    "ffn swiglu, cola": Case({**COLA, **SWIGLU}, _layer("mlp"), ffn),
    "ffn swiglu, cola relu2 2:4": Case({**SWIGLU, **COLA_SPARSE}, _layer("mlp"), ffn),
    "ffn relu2 2:4, cola": Case(COLA, _layer("mlp"), ffn),
    "attention": Case(LOWRANK, _layer("self_attention"), attention, _attend),
    "attention, full rank": Case(FULL, _layer("self_attention"), attention, _attend),
    "attention, cola": Case(COLA, _layer("self_attention"), attention, _attend),
    **{
        f"{name}, {kind}, biases": Case({**overrides, **more}, _layer(layer), reference, call, megatron=BIASES)
        for kind, overrides in {"low rank": LOWRANK, "full rank": FULL, "cola": COLA}.items()
        for name, more, layer, reference, call in (
            ("ffn relu2 2:4", {}, "mlp", ffn, _plain_call),
            ("ffn swiglu", SWIGLU, "mlp", ffn, _plain_call),
            ("attention", {}, "self_attention", attention, _attend),
        )
    },
    "attention, biases of q, k and v": Case(
        LOWRANK, _layer("self_attention"), attention, _attend, megatron={"add_qkv_bias": True}
    ),
    "attention, qk norm": Case(LOWRANK, _layer("self_attention"), attention, _attend, megatron=QK_NORM),
    "attention, full rank, qk norm": Case(FULL, _layer("self_attention"), attention, _attend, megatron=QK_NORM),
    "norm": Case(LOWRANK, _norm, rms_norm, lambda layer, x: [layer(x)]),
}


# ------------------------------------------------------------------------------------------------- on a rank


def megatron_config(tp: int, sequence: bool, overrides: dict, megatron: dict | None = None):
    """Megatron's configuration of the small model, 2:4 active from the start."""
    import dataclasses

    from elas.config import load_config
    from elas.model.transformer_config import transformer_config

    model = {"hidden_size": H, "num_layers": 1, "num_attention_heads": NP, "num_query_groups": NG, "ffn_hidden_size": F}
    values = {f"model.{key}": value for key, value in model.items()}
    values |= {"low_rank.rank": R, "sparsity.dense_steps": 0, "train.dtype": "float32", "model.activation": "relu2"}
    values |= {"parallel.tensor": tp, "parallel.sequence": sequence and tp > 1, "model.seq_length": S, **overrides}
    return dataclasses.replace(transformer_config(load_config(None, values)), **(megatron or {}))


def part(full: torch.Tensor, dim: int | None, tp: int, rank: int, stride: int = 1) -> torch.Tensor:
    """What a rank holds of a tensor split along `dim` (None: all of it); with stride 2, of each half."""
    if dim is None:
        return full
    return torch.cat([piece.chunk(tp, dim)[rank] for piece in full.chunk(stride, dim)], dim)


def split_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite for a wrong shape."""
    if value is None or value.shape != expected.shape:
        return float("inf")
    return float((value.double() - expected).abs().max() / expected.abs().max())


def check_layers(tp: int, sequence: bool) -> dict[str, dict[str, float]]:
    """Every case on this rank: errors by tensor name, by case."""
    from elas import parallel
    from elas.config import ParallelConfig

    layout = parallel.initialize(ParallelConfig(tensor=tp, sequence=sequence), seed=1)
    return {name: _errors(case, tp, layout.tp_rank, sequence) for name, case in CASES.items()}


def _errors(case: Case, tp: int, rank: int, sequence: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:  # at the scale that keeps every activation near 1
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = megatron_config(tp, sequence, case.overrides, case.megatron)
    layer = case.build(config)
    weights = {}
    for name, p in layer.named_parameters():
        shape = [size * (tp if dim == split_dim(p) else 1) for dim, size in enumerate(p.shape)]
        weights[name] = (draw(*shape) / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * draw(*shape)).float().double()
        stride = getattr(p, "partition_stride", 1)
        p.data.copy_(part(weights[name], split_dim(p), tp, rank, stride))
        weights[name].requires_grad_()

    x_full = draw(S, B, case.width).float().double().requires_grad_()
    expected = case.reference(x_full, weights, config)
    upstream = [draw(*y.shape).float().double() for y in expected]
    torch.autograd.backward(expected, upstream)

    token_dim = 0 if sequence else None
    in_dim = -1 if case.splits_input else token_dim
    out_dim = -1 if case.splits_output else token_dim
    x = part(x_full.detach(), in_dim, tp, rank).float().requires_grad_()
    y = case.call(layer, x)
    torch.autograd.backward(y, [part(dy, out_dim, tp, rank).float() for dy in upstream])

    errors = {f"output {i}": error(a, part(b, out_dim, tp, rank)) for i, (a, b) in enumerate(zip(y, expected))}
    errors["input gradient"] = error(x.grad, part(x_full.grad, in_dim, tp, rank))
    for name, p in layer.named_parameters():
        # These saw their own tokens, or heads, only; `elas.engine.grads` and Megatron sum them.
        if getattr(p, "sequence_parallel", False) or "_layernorm." in name:
            torch.distributed.all_reduce(p.grad)
        stride = getattr(p, "partition_stride", 1)
        errors[name] = error(p.grad, part(weights[name].grad, split_dim(p), tp, rank, stride))
    return errors
