"""Bytes that the rank with most traffic sends in a training step, by formula and by link.

Legend: h hidden, r rank, t tensor-parallel, p pipeline, d data-parallel ranks.

DeepSpeed's and Megatron's collectives are counted as they are called (tests/distributed/test_traffic.py counts them on
real ranks), as rings: a rank sends (t − 1)/t of an all-gather or reduce-scatter, twice that of an all-reduce. What
`elas bench comm` counts on real ranks is `tensor_values`.
"""

from dataclasses import dataclass

from elas.config import Config, recompute_of
from elas.config.deepspeed import read_deepspeed_json, zero_stage
from elas.model.loss_chunks import chunk_tokens
from elas.plan.counts import rank_parameters, replicated_parameters
from elas.plan.muon import exchanged_bytes
from elas.plan.shapes import rank_sizes

Values = dict[str, int]
"""Values for each token in collectives, by kind."""
Bytes = dict[str, float]
"""Bytes that a rank sends, by kind of collective."""
SHARES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


def tensor_values(config: Config, sequence: bool) -> tuple[Values, Values]:
    """Values for each token that a layer's collectives carry within a tensor-parallel group: forward, backward.

    Full rank as Megatron, whose linears gather their input again in the backward pass under sequence parallelism; a
    squared-ReLU FFN of ours keeps what it gathered. Low rank sends bottlenecks only.
    """
    h, r = config.model.hidden_size, config.low_rank.rank
    gated = config.model.activation == "swiglu"
    if config.low_rank.kind == "none":
        if not sequence:
            return {"all_reduce": 2 * h}, {"all_reduce": 2 * h}
        again = 2 * h if gated else h
        return {"all_gather": 2 * h, "reduce_scatter": 2 * h}, {"all_gather": 2 * h + again, "reduce_scatter": 2 * h}
    columns = (5 if gated else 4) * r  # q, k, v, up and gate
    if not sequence:
        return {"all_reduce": 2 * r}, {"all_reduce": columns}
    return {"all_gather": columns, "reduce_scatter": 2 * r}, {"reduce_scatter": columns, "all_gather": 2 * r}


def ring(values: Values, ranks: int) -> float:
    """Values that one rank sends."""
    return sum(SHARES[kind] * count for kind, count in values.items()) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    tensor: float
    """Within tensor-parallel groups."""
    pipeline: float
    """To the neighbouring stages, hidden states and their gradients."""
    data: float
    """Gradients, and weights where ZeRO partitions them."""
    matrices: float = 0.0
    """Muon's directions and steps, to owners of matrices and back: the mean of a stage's ranks."""

    @property
    def total(self) -> float:
        """Sum."""
        return sum(vars(self).values())


def traffic(config: Config, world_size: int) -> Traffic:
    """Traffic of a step.

    Args:
        config: validated for `world_size` ranks, with its ZeRO stage chosen.
        world_size: ranks.
    """
    tensor, pipeline, data = traffic_by_kind(config, world_size)
    stage = zero_stage(read_deepspeed_json(config))
    return Traffic(sum(tensor.values()), pipeline, sum(data.values()), exchanged_bytes(config, world_size, stage))


def traffic_by_kind(config: Config, world_size: int) -> tuple[Bytes, float, Bytes]:
    """Traffic of a step within tensor-parallel groups by kind of collective, of the pipeline, of data parallelism."""
    parallel, model, train = config.parallel, config.model, config.train
    t, p = parallel.tensor, parallel.pipeline
    d = world_size // (t * p)
    e = 4 if train.dtype == "float32" else 2
    tokens = train.global_batch_size // d * model.seq_length
    micro_batches = train.global_batch_size // (train.micro_batch_size * d)
    values = read_deepspeed_json(config)
    stage, zero = zero_stage(values), values.get("zero_optimization", {})
    held = rank_parameters(config)
    each = _data_bytes(config, zero, stage, e, micro_batches) if d > 1 else {}
    return (
        _tensor(config, tokens, e, stage, micro_batches) if t > 1 else {},
        _pipeline(config, tokens, e),
        {kind: (d - 1) / d * held * size for kind, size in each.items()},
    )


def tensor_calls(config: Config) -> tuple[int, int]:
    """Collectives of a micro-batch within a tensor-parallel group: of one layer, and of embedding and head together."""
    sequence, full_rank = config.parallel.sequence, config.low_rank.kind == "none"
    forward = 4 if sequence else 2
    again = (2 if config.model.activation == "swiglu" else 1) if full_rank and sequence else 0
    layer = 2 * forward + again + (forward if recompute_of(config) == "layer" else 0)
    chunk = chunk_tokens(config.model.vocab_size // config.parallel.tensor)
    chunks = -(-config.train.micro_batch_size * config.model.seq_length // chunk)
    return layer, (4 if sequence else 2) + 2 * chunks


def data_calls(config: Config, stage: int, micro_batches: int) -> int:
    """Collectives of a step over data-parallel ranks: ZeRO 3 gathers each weight that it partitions, in each pass."""
    if stage <= 2:
        return {0: 1, 1: 2, 2: micro_batches + 1}[stage]
    weights = 4 if config.low_rank.kind == "none" else 9
    return micro_batches * (2 * (weights * config.model.num_layers + 2) + 1)


def _tensor(config: Config, tokens: int, e: int, stage: int, micro_batches: int) -> Bytes:
    parallel, model, t = config.parallel, config.model, config.parallel.tensor
    layers = model.num_layers // parallel.pipeline
    forward, backward = tensor_values(config, parallel.sequence)
    sent: Bytes = {}
    for values in (forward, backward, forward if recompute_of(config) == "layer" else {}):
        for kind, count in values.items():
            sent[kind] = sent.get(kind, 0.0) + tokens * layers * ring({kind: count}, t) * e
    # The embedding's sum and the head's gradient, and for each token's loss three fp32 numbers: with a pipeline on two
    # different ranks, of which the one with the head has more.
    ends = 2 * (t - 1) / t * model.hidden_size * e * (1 if parallel.pipeline > 1 else 2)
    reduced = tokens * (ends + 2 * (t - 1) / t * 3 * 4)
    if parallel.sequence:
        # Gradients of replicated parameters are partial sums: once a step, or with ZeRO 2 and 3 in each backward pass.
        reduced += 2 * (t - 1) / t * replicated_parameters(config) * e * (1 if stage <= 1 else micro_batches)
    return {**sent, "all_reduce": sent.get("all_reduce", 0.0) + reduced}


def _pipeline(config: Config, tokens: int, e: int) -> float:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    # Each chunk's hidden states and gradients; of two stages each is at one end.
    h, t = config.model.hidden_size, parallel.tensor
    tensors = 2 * parallel.virtual_pipeline - (parallel.pipeline == 2)
    # The first and the last stage sum the gradients of a tied embedding, an all-reduce of two ranks.
    tied = config.model.vocab_size // t * h * e if config.model.tie_embeddings else 0
    return tensors * tokens * h * e / (t if parallel.sequence else 1) + tied


def _data_bytes(config: Config, values: dict, stage: int, e: int, micro_batches: int) -> Bytes:
    """Bytes for each parameter that a ring of very many ranks sends. DeepSpeed reduces gradients in fp32.

    ZeRO 1 and 2 all-reduce, though each rank needs a part only. ZeRO 3 reduce-scatters. It gathers weights up to a size
    once a step, larger ones in each micro-batch, and where not all of them may stay, in each of its passes.
    """
    if stage == 0:
        return {"all_reduce": 2 * 4}
    if stage <= 2:
        return {"all_reduce": 2 * 4 * (1 if stage == 1 else micro_batches), "all_gather": e}
    held = rank_parameters(config)
    small = _persistent(config, _whole(values, "stage3_param_persistence_threshold", 10**5)) / held
    passes = 1 if held <= _whole(values, "stage3_max_live_parameters", 10**9) else 2
    return {"reduce_scatter": 4 * micro_batches, "all_gather": e * (small + (1 - small) * micro_batches * passes)}


def _persistent(config: Config, most: int) -> int:
    """Parameters of weights that are so small that ZeRO 3 keeps them on every rank."""
    return sum(size for size in rank_sizes(config) if size <= most)


def _whole(values: dict, name: str, default: int) -> int:
    """DeepSpeed's number, or its default for one that is left out or "auto"."""
    found = values.get(name, default)
    return found if isinstance(found, int) else default
