"""The model in plain PyTorch, from its description alone: nothing of elas, Megatron or DeepSpeed is imported.

Legend: b batch, s sequence, h hidden, n query heads, k key/value heads, d head width, f d_ff, r rank, v vocabulary.

Weights are a dictionary by global name, whole tensors in whatever dtype the caller wants (the tests use fp64).
Attention is an explicit s × s softmax, 2:4 a sort of each group of four, and gradients are autograd's: slow, and with
no piece in common with what is tested.
"""

import hashlib
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

Weights = dict[str, Tensor]


def shapes(settings: dict) -> dict[str, tuple[tuple[int, int] | tuple[int], float]]:
    """Shape of every parameter and the standard deviation of its initial values, by global name.

    Vectors are norm weights, which start as ones. Factors follow arXiv 2605.03667 (lowrank: sqrt(2 / (size + r))) or
    arXiv 2502.10940 (cola: (in + out)^(-1/4) · r^(-1/4)).
    """
    model, low_rank = settings["model"], settings["low_rank"]
    h, f, r = model["hidden_size"], model["ffn_hidden_size"], low_rank["rank"]
    d = h // model["num_attention_heads"]
    kv = d * (model["num_query_groups"] or model["num_attention_heads"])
    gated = model["activation"] == "swiglu"
    std = model["init_std"]

    def factor_std(size: int, into: int, out: int) -> float:
        return ((into + out) * r) ** -0.25 if low_rank["kind"] == "cola" else math.sqrt(2 / (size + r))

    def linear(name: str, into: int, outs: dict[str, int]) -> dict:
        if low_rank["kind"] == "none":
            return {f"{name}.weight": ((sum(outs.values()), into), std)}
        mean_out = sum(outs.values()) // len(outs)
        pairs = {f"{name}.factor_in": ((len(outs) * r, into), factor_std(into, into, mean_out))}
        for suffix, out in outs.items():
            pairs[f"{name}.factor_out{suffix}"] = ((out, r), factor_std(out, into, out))
        return pairs

    found = {"embedding.word_embeddings.weight": ((model["vocab_size"], h), std)}
    for layer in range(model["num_layers"]):
        at = f"decoder.layers.{layer}."
        found[at + "input_layernorm.weight"] = found[at + "pre_mlp_layernorm.weight"] = ((h,), 0.0)
        found |= linear(at + "self_attention.linear_qkv", h, {"_q": h, "_k": kv, "_v": kv})
        found |= linear(at + "self_attention.linear_proj", h, {"": h})
        found |= linear(at + "mlp.linear_fc1", h, {"_gate": f, "_up": f} if gated else {"": f})
        found |= linear(at + "mlp.linear_fc2", f, {"": h})
    found["decoder.final_layernorm.weight"] = ((h,), 0.0)
    if not model["tie_embeddings"]:
        found["output_layer.weight"] = ((model["vocab_size"], h), std)
    return found


def initial_weights(settings: dict, dtype: torch.dtype) -> Weights:
    """Every parameter as the run's seed draws it: by its name and whole shape, in fp32."""
    weights = {}
    for name, (shape, std) in shapes(settings).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=dtype)
            continue
        digest = hashlib.sha256(f"{settings['train']['seed']}:{name}:{shape}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        weights[name] = torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype)
    return weights


def squared_relu(z: Tensor, sparsity: dict, sparse: bool) -> Tensor:
    """relu(z)², `[..., f]`; with `sparse`, of every four consecutive features only the two largest.

    `soft_threshold` takes the third largest off both before squaring, and multiplies by `scale`. The straight-through
    gradient is that of the activation before pruning (times `scale`).
    """
    rho = z.relu()
    if not sparse or sparsity["kind"] == "none":
        return rho.square()
    groups = rho.view(*rho.shape[:-1], -1, 4)
    ranked = groups.sort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups).scatter(-1, ranked.indices[..., :2], 1.0)
    scale = 1.0
    if sparsity["method"] == "soft_threshold":
        scale, groups = sparsity["scale"], groups - ranked.values[..., 2:3]
    pruned = (scale * keep * groups.square()).view_as(rho)
    if sparsity["gradient"] == "masked":
        return pruned
    whole = scale * rho.square()
    return whole + (pruned - whole).detach()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., h]` over its root mean square, times `weight [h]`."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions on `x [b, s, heads, d]`: feature i turns with feature i + d/2, by position · base^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (part[:, None, :].to(x.dtype) for part in (angle.cos(), angle.sin()))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Forward:
    """One pass over a batch.

    Args:
        weights: by global name.
        settings: the run's configuration as nested plain dictionaries.
        sparse: whether 2:4 is on.
    """

    def __init__(self, weights: Weights, settings: dict, sparse: bool):
        self.weights, self.settings, self.sparse = weights, settings, sparse
        self.model, self.low_rank = settings["model"], settings["low_rank"]
        self.full_rank = self.low_rank["kind"] == "none"

    def loss_sum(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropy over the labels that count (not −1); `tokens` and `labels` `[b, s]`."""
        x = self.weights["embedding.word_embeddings.weight"][tokens]
        for layer in range(self.model["num_layers"]):
            at = f"decoder.layers.{layer}."
            x = x + self._attention(at + "self_attention.", self._norm(at + "input_layernorm", x))
            x = x + self._ffn(at + "mlp.", self._norm(at + "pre_mlp_layernorm", x))
        tied = self.model["tie_embeddings"]
        head = self.weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
        logits = self._norm("decoder.final_layernorm", x) @ head.T
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.model["norm_eps"])

    def _between(self, u: Tensor) -> Tensor:
        """What stands between the two factors: nothing, or CoLA's non-linearity."""
        if self.low_rank["kind"] != "cola":
            return u
        if self.low_rank["activation"] == "silu":
            return silu(u)
        return squared_relu(u, self.settings["sparsity"], self.sparse)

    def _linear(self, name: str, x: Tensor, suffix: str = "", pair: int = 0) -> Tensor:
        """One linear, or one pair of several that share a stacked `factor_in`."""
        if self.full_rank:
            return x @ self.weights[f"{name}.weight"].T
        r = self.low_rank["rank"]
        factor_in = self.weights[f"{name}.factor_in"][pair * r : (pair + 1) * r]
        return self._between(x @ factor_in.T) @ self.weights[f"{name}.factor_out{suffix}"].T

    def _qkv(self, name: str, x: Tensor) -> list[Tensor]:
        """Query `[b, s, n, d]`, key and value `[b, s, k, d]`; at full rank one weight holds, head group by head group,
        the group's queries, its key and its value (Megatron's order)."""
        n = self.model["num_attention_heads"]
        k, d = self.model["num_query_groups"] or n, self.model["hidden_size"] // n
        if not self.full_rank:
            parts = [self._linear(name, x, suffix, pair) for pair, suffix in enumerate(("_q", "_k", "_v"))]
            return [part.unflatten(-1, (-1, d)) for part in parts]
        groups = self._linear(name, x).unflatten(-1, (k, n // k + 2, d))
        query, key, value = groups.split([n // k, 1, 1], dim=-2)
        return [query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)]

    def _attention(self, at: str, x: Tensor) -> Tensor:
        query, key, value = self._qkv(at + "linear_qkv", x)
        query, key = (rotate(part, self.model["rotary_base"]) for part in (query, key))
        key, value = (part.repeat_interleave(query.shape[2] // part.shape[2], dim=2) for part in (key, value))
        scores = torch.einsum("bsnd,btnd->bnst", query, key) / math.sqrt(query.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(future, -math.inf).softmax(-1)
        return self._linear(at + "linear_proj", torch.einsum("bnst,btnd->bsnd", probabilities, value).flatten(-2))

    def _ffn(self, at: str, x: Tensor) -> Tensor:
        if self.model["activation"] == "relu2":
            z = self._linear(at + "linear_fc1", x)
            return self._linear(at + "linear_fc2", squared_relu(z, self.settings["sparsity"], self.sparse))
        if self.full_rank:
            gate, up = self._linear(at + "linear_fc1", x).chunk(2, -1)
        else:
            gate, up = self._linear(at + "linear_fc1", x, "_gate", 0), self._linear(at + "linear_fc1", x, "_up", 1)
        return self._linear(at + "linear_fc2", silu(gate) * up)
