"""Floating-point operations of training, for each token, by formula.

Legend: h hidden, g key/value width, f d_ff, r rank, V vocabulary, s sequence.

A product of [m, k] and [k, n] has 2·m·k·n. Three counts, which must not be mixed:

- **model**: what the model's function and its gradients need: each product of the forward pass and two of the backward
  pass. Of the s scores of a token's causal attention, half on average. MFU is this over time and the device's peak.
- **hardware**: what is computed: also what the backward pass computes again (`train.recompute`, the fused FFN), and the
  products of replicated factors on every tensor-parallel rank, where sequence parallelism does not divide the tokens.
- **dense-equivalent**: what the full-rank twin would need for the same tokens: a Llama of the same widths, whose gated
  FFN has as many weights (two thirds of a squared ReLU's width).

Products with 2:4 operands count as dense in all three: our kernels compute them with dense matrix units.
"""

from dataclasses import dataclass

from elas.config import Config, ffn_width, recompute_of
from elas.plan.counts import key_value_width

BACKWARD = 2
"""Products of the backward pass for one of the forward pass."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass in the whole model, by component."""

    attention: float
    """Linears of attention."""
    scores: float
    """Scores and their product with the values, of s / 2 keys on average."""
    ffn: float
    head: float

    @property
    def forward(self) -> float:
        """Of all components."""
        return self.attention + self.scores + self.ffn + self.head

    @property
    def training(self) -> float:
        """Forward and backward pass: the model's FLOPs for a token."""
        return (1 + BACKWARD) * self.forward


def model_flops(config: Config) -> Flops:
    """FLOPs of the forward pass for one token, as configured."""
    model = config.model
    h, f = model.hidden_size, ffn_width(config)
    gated = model.activation == "swiglu"
    return _flops(config, None if config.low_rank.kind == "none" else config.low_rank.rank, 3 if gated else 2, h, f)


def twin_flops(config: Config) -> Flops:
    """FLOPs of the forward pass for one token of the full-rank twin, with a gated FFN."""
    f = ffn_width(config) if config.model.activation == "swiglu" else ffn_width(config) * 2 / 3
    return _flops(config, None, 3, config.model.hidden_size, f)


def _flops(config: Config, rank: int | None, matrices: int, h: int, f: float) -> Flops:
    model, g = config.model, key_value_width(config)
    if rank is None:
        attention, ffn = h * (h + 2 * g) + h * h, matrices * h * f
    else:
        attention, ffn = 3 * rank * h + rank * (h + 2 * g) + 2 * rank * h, matrices * rank * (h + f)
    layers = model.num_layers
    scores = 2 * h * model.seq_length / 2
    return Flops(2 * layers * attention, 2 * layers * scores, 2 * layers * ffn, 2 * h * model.vocab_size)


@dataclass(frozen=True)
class Work:
    """FLOPs of one token in one layer on one tensor-parallel rank, by kind of product."""

    linear: float
    """Of full-rank weights or of factors, outside the core."""
    core: float
    """Up and down product of a squared-ReLU FFN: from and to u and v, r wide, at full rank h wide."""
    scores: float

    @property
    def total(self) -> float:
        """Of all kinds."""
        return self.linear + self.core + self.scores


def layer_work(config: Config) -> Work:
    """FLOPs of one token's forward pass in one layer, on one tensor-parallel rank.

    The factor on the side of the hidden vector is whole on every rank: without sequence parallelism all ranks of a
    group compute its products of all tokens, with it each those of its own.
    """
    model, t = config.model, config.parallel.tensor
    h, f, g, r = model.hidden_size, ffn_width(config), key_value_width(config), config.low_rank.rank
    gated = model.activation == "swiglu"
    scores = 2 * h * model.seq_length / t
    if config.low_rank.kind == "none":
        linear = 2 * (h * (2 * h + 2 * g) + (3 * h * f if gated else 0)) / t
        return Work(linear, 0.0 if gated else 4 * h * f / t, scores)
    inputs = 2 if gated else 1
    replicated = 2 * (5 + inputs) * r * h / (t if config.parallel.sequence else 1)
    split = 2 * r * (2 * h + 2 * g + ((inputs + 1) * f if gated else 0)) / t
    return Work(replicated + split, 0.0 if gated else 4 * r * f / t, scores)


def again_work(config: Config) -> Work:
    """FLOPs of one token in one layer, on one tensor-parallel rank, that the backward pass computes again."""
    model, t, r = config.model, config.parallel.tensor, config.low_rank.rank
    h, f, g = model.hidden_size, ffn_width(config), key_value_width(config)
    gated, recompute = model.activation == "swiglu", recompute_of(config)
    linear = core = scores = 0.0
    if recompute == "layer":
        whole = layer_work(config)
        linear, core, scores = whole.linear, whole.core, whole.scores
    elif recompute == "bottleneck":
        linear = 2 * r * (h + 2 * g + (2 * f if gated else 0)) / t
    if not gated and config.sparsity.ffn_memory == "fused":
        # The up projection, from u: f × r, or f × h at full rank.
        core += 2 * f * (h if config.low_rank.kind == "none" else r) / t
    return Work(linear, core, scores)


def hardware_flops(config: Config) -> float:
    """FLOPs for one token of forward and backward pass: with what is computed again, and on several ranks alike."""
    layers = (1 + BACKWARD) * layer_work(config).total + again_work(config).total
    return config.model.num_layers * config.parallel.tensor * layers + (1 + BACKWARD) * model_flops(config).head
