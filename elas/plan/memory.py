"""Estimated memory of the rank that needs most, by component.

Legend: h hidden, g key/value width, f d_ff, r rank, V vocabulary, t tensor-parallel ranks, e bytes per value.

What layers save for the backward pass is exact (`token_bytes`; `elas bench step` measures it beside). Temporary tensors
of kernels and allocator overhead are not included.
"""

from dataclasses import dataclass

from elas.config import Config, ffn_width, recompute_of
from elas.config.deepspeed import offloads_optimizer, read_deepspeed_json, zero_stage
from elas.model.loss_chunks import SLICE, chunk_tokens
from elas.plan.counts import largest_weight, rank_parameters
from elas.plan.muon import matrix_parameters

RUNTIME = 520 * 10**6
"""Python, torch, Megatron-core and DeepSpeed in a process without a GPU, as measured (docs/results.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most."""

    weights: int
    gradients: int
    """Includes the fp32 sums over micro-batches and the reduction bucket."""
    optimizer: int
    """fp32 master weights and two moments, Muon's one of matrices; 0 if they are offloaded to the host."""
    activations: int
    """Saved by the layers for backward, for every micro-batch in flight."""
    head: int
    """A chunk of logits, and the gradients that the loss computes from it."""
    runtime: int
    """The process itself; with a GPU this is host memory, and the device holds a context instead."""

    @property
    def total(self) -> int:
        """Sum of all components."""
        return sum(vars(self).values())


def estimate(config: Config, world_size: int, device: str = "cpu") -> Memory:
    """Estimate the memory of the rank that needs most.

    Args:
        config: validated for `world_size` ranks, with its ZeRO stage chosen (`choose_zero_stage`).
        world_size: number of ranks.
        device: cpu or cuda, whose chunks of the loss differ.
    """
    parallel, values = config.parallel, read_deepspeed_json(config)
    stage, dp = zero_stage(values), world_size // (parallel.tensor * parallel.pipeline)
    e = 4 if config.train.dtype == "float32" else 2
    held, part = rank_parameters(config), -(-rank_parameters(config) // dp)
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * dp)
    masters = 4 if stage > 0 or e == 2 else 0
    return Memory(
        weights=e * (part if stage == 3 else held),
        gradients=_gradients(values, stage, held, part, e, micro_batches, largest_weight(config)),
        optimizer=0 if offloads_optimizer(values) else _optimizer(config, masters, held, dp if stage else 1),
        activations=_activations(config, micro_batches, e),
        head=_head(config, e, device, micro_batches),
        runtime=RUNTIME,
    )


def _optimizer(config: Config, masters: int, held: int, parts: int) -> int:
    """Bytes of masters and moments, of which a rank has one of `parts`."""
    of_matrices = matrix_parameters(config) if config.optimizer.kind == "muon" else 0
    return -(-((masters + 8) * held - 4 * of_matrices) // parts)


def _gradients(values: dict, stage: int, held: int, part: int, e: int, micro_batches: int, largest: int) -> int:
    """Bytes of the weights' gradients, their fp32 sums or copies, and ZeRO's bucket."""
    if stage == 0:  # in bf16 plus the optimizer's fp32 copy, in fp32 the squares of the largest one for the norm
        return e * held + (4 * held if e == 2 else 4 * largest)
    bucket = values.get("zero_optimization", {}).get("reduce_bucket_size", 5 * 10**8)
    bucket = 4 * min(bucket if isinstance(bucket, int) else held, held)
    if stage == 1:
        sums = 4 * held if e == 2 and micro_batches > 1 else 0
        return e * held + sums + 4 * part + bucket
    return (e + 4) * part + bucket


def _in_flight(config: Config, micro_batches: int) -> float:
    """Micro-batches whose activations the first stage holds at once; interleaving adds a fraction of one."""
    pp, vpp = config.parallel.pipeline, config.parallel.virtual_pipeline
    if pp == 1:
        return 1
    return min(micro_batches, pp) if vpp == 1 else min(micro_batches, pp + (pp - 1) / vpp)


def _activations(config: Config, micro_batches: int, e: int) -> int:
    """Bytes saved for backward by one stage's layers, for the micro-batches in flight."""
    tokens = config.train.micro_batch_size * config.model.seq_length
    layers = config.model.num_layers // config.parallel.pipeline
    saved = _in_flight(config, micro_batches) * layers * token_bytes(config, e)
    if recompute_of(config) == "layer":  # and all that one layer saves, while its backward pass runs
        saved += token_bytes(config, e, recompute="none")
    return int(tokens * saved)


def token_bytes(config: Config, e: int, *, recompute: str | None = None, ffn_memory: str | None = None) -> float:
    """Bytes that one layer saves for the backward pass, for each token, on one rank: the sum of `token_parts`."""
    return sum(token_parts(config, e, recompute=recompute, ffn_memory=ffn_memory).values())


def token_parts(
    config: Config, e: int, *, recompute: str | None = None, ffn_memory: str | None = None
) -> dict[str, float]:
    """What one layer saves for the backward pass, in bytes for each token on one rank.

    docs/memory.md has the account. `train.recompute: bottleneck` leaves the inputs of norms, the attention's output and
    the bottlenecks; `layer` the layer's input.

    Args:
        config: the configuration.
        e: bytes per value.
        recompute: instead of `train.recompute`.
        ffn_memory: instead of `sparsity.ffn_memory`.
    """
    recompute = recompute or recompute_of(config)
    model, tp = config.model, config.parallel.tensor
    h, f, heads = model.hidden_size, ffn_width(config), model.num_attention_heads
    shard = tp if config.parallel.sequence else 1
    if recompute == "layer":
        return {"norm inputs": h / shard * e}
    gated = model.activation == "swiglu"
    again = recompute == "bottleneck"
    queries = 3 * h / tp * e  # keys and values are repeated for each query head
    if config.low_rank.kind == "none" and not model.num_query_groups:
        queries += 2 * h / tp * e  # v is a view of the tensor in which q, k and v were computed, and keeps it whole
    kept = {"fused": 0.0, "compressed": 0.5 + 1 / (8 * e), "eager": 3.0 if config.sparsity.kind == "2:4" else 2.0}
    if gated:
        wide = 0.0 if again else 4.0
    else:
        wide = kept[ffn_memory or config.sparsity.ffn_memory]
    return {
        "norm inputs": 2 * h / shard * e,
        "norm outputs": 0.0 if again else 2 * h / shard * e,
        "q, k, v": 0.0 if again else queries,
        "attention output": h / tp * e,
        "bottlenecks": _bottlenecks(config, shard) * e,
        "FFN": wide * f / tp * e,
        # fp32 scales of the norms' rows, fp32 sums of the softmax
        "small": 2 * 4 / shard + 4 * heads / tp,
    }


def _bottlenecks(config: Config, shard: int) -> float:
    """Values of all bottlenecks for each token."""
    if config.low_rank.kind == "none":
        return 0.0
    r = config.low_rank.rank
    # Those of q, k, v, up and gate are gathered under sequence parallelism, the two of rows are split.
    columns = 5 if config.model.activation == "swiglu" else 4
    found = (columns + 2 / shard) * r
    if config.low_rank.kind == "cola":  # also what goes into the non-linearity between the factors, split
        found += (columns + 2) / shard * r
    return found


def _head(config: Config, e: int, device: str, micro_batches: int) -> int:
    """Head and loss: a chunk's logits, in fp32 and in the weights' dtype, and gradients found in the forward pass.

    The weight's gradient is in fp32 what stays, with several micro-batches beside their sum; in bf16 it is summed in
    fp32, from slices.
    """
    model, tokens = config.model, config.train.micro_batch_size * config.model.seq_length
    vocabulary = model.vocab_size // config.parallel.tensor
    chunk = min(tokens, chunk_tokens(vocabulary, device)) * vocabulary * (4 if e == 4 else 4 + e)
    if e == 4:
        weight = 4 * vocabulary * model.hidden_size if micro_batches > 1 else 0
    else:
        weight = (4 * vocabulary + (4 + e) * min(SLICE, vocabulary)) * model.hidden_size
    return chunk + weight + tokens * model.hidden_size * e
