"""What Muon's steps of matrices add to a training step: work, traffic and state, by formula (`elas.engine.muon_cycle`).

Legend: h hidden, g key/value width, f d_ff, r rank, t tensor-parallel, d data-parallel ranks, R = t·d of a stage.
"""

from dataclasses import dataclass

from elas.config import Config, ffn_width
from elas.config.deepspeed import read_deepspeed_json
from elas.errors import ConfigError
from elas.plan.counts import key_value_width, layer_parameters

SQUARINGS = 24
"""That of `elas.optim.muon`, which would import torch."""


@dataclass(frozen=True)
class Matrix:
    """One of a layer's, `[n, k]`."""

    n: int
    k: int
    split: bool
    """Over tensor-parallel ranks; else each holds all of it."""


def matrices(config: Config) -> list[Matrix]:
    """Of one layer: factors, or weights; q, k, v and gate, up one by one."""
    h, f, g = config.model.hidden_size, ffn_width(config), key_value_width(config)
    first = [f, f] if config.model.activation == "swiglu" else [f]
    columns, rows = [(h, out) for out in (h, g, g, *first)], [(h, h), (f, h)]  # inputs and outputs of the linears
    if config.low_rank.kind == "none":
        return [Matrix(out, into, True) for into, out in (*columns, *rows)]
    r = config.low_rank.rank
    found = [Matrix(out, r, True) for _, out in columns] + [Matrix(r, into, False) for into, _ in columns]
    return found + [Matrix(out, r, False) for _, out in rows] + [Matrix(r, into, True) for into, _ in rows]


def matrix_parameters(config: Config) -> int:
    """Parameters of matrices on a rank of the largest pipeline stage, before ZeRO partitions them."""
    layers = config.model.num_layers // config.parallel.pipeline
    return layers * (layer_parameters(config, config.parallel.tensor) - 2 * config.model.hidden_size)


def divides_pairs(config: Config) -> bool:
    """Whether steps are divided by the norms of factors, so that owners need weights as well as momenta."""
    return config.optimizer.normalize == "spectron" and config.low_rank.kind != "none"


def check_sub_groups(config: Config, world_size: int) -> None:
    """Check that ZeRO 3 steps both factors of every pair at once where `normalize: spectron` divides by both norms.

    A rank's share of the matrices must be one sub-group: where another begins is DeepSpeed's choice. Without a
    `sub_group_size` in a JSON it is (`elas.engine.deepspeed.fit_sub_groups`).

    Args:
        config: validated for `world_size` ranks.
        world_size: number of ranks.

    Raises:
        ConfigError: it may be more than one.
    """
    zero = read_deepspeed_json(config).get("zero_optimization", {})
    size = zero.get("sub_group_size")
    if not divides_pairs(config) or zero.get("stage", 0) != 3 or size is None:
        return
    t = config.parallel.tensor
    sizes = (one.n * one.k // (t if one.split else 1) for one in matrices(config))
    share = config.model.num_layers * sum(-(-size // (world_size // t)) for size in sizes)
    if share > size:
        why = f"takes the norms of both factors of a pair, and ZeRO 3 may part them: sub-groups of {size:,} weights"
        fix = f"set zero_optimization.sub_group_size to {share} or more in parallel.deepspeed_config"
        raise ConfigError("optimizer.normalize", "spectron", why, fix)


def iteration_flops(config: Config, device: str) -> float:
    """fp64 FLOPs of products with which one pipeline stage orthogonalizes its matrices in a step.

    A matrix's Gram matrix and the product with its polynomial have 2·n·k² each with k the shorter side; a step of the
    iteration has four products of k × k, the first one fewer, the last two fewer. With `normalize: spectron` the
    largest singular value of a factor takes its own Gram matrix and, on a GPU, products of k × k alone.

    Args:
        config: with Muon.
        device: cuda or cpu.
    """
    layers, steps = config.model.num_layers // config.parallel.pipeline, config.optimizer.muon_steps
    total = 0.0
    for one in matrices(config):
        n, k = max(one.n, one.k), min(one.n, one.k)
        total += 4 * n * k**2 + 2 * (4 * steps - 3) * k**3
        if divides_pairs(config):
            total += 2 * n * k**2 + (2 * SQUARINGS * k**3 if device == "cuda" else 0)
    return layers * total


def exchanged_bytes(config: Config, world_size: int, stage: int) -> float:
    """Bytes that a rank sends in a step so that matrices are whole on their owners, and to bring steps back; the mean.

    Exact but for where ZeRO's partitions begin and end: an owner needs no part that it has itself.
    """
    if config.optimizer.kind != "muon":
        return 0.0
    t, p = config.parallel.tensor, config.parallel.pipeline
    ranks = world_size // p
    layers = config.model.num_layers // p
    sources = 2 if divides_pairs(config) else 1
    total = 0.0
    for one in matrices(config):
        size = one.n * one.k
        held = size * (1 if one.split else t) * (ranks // t if stage == 0 else 1)  # on all ranks together
        total += sources * (size - held / ranks) + held - held / ranks
    return 4 * layers * total / ranks
