"""Estimated time of a training step, by roofline; no GPU is needed.

Products run at a share of the peak that depends on their kind, other work at a share of the memory's bandwidth, and
collectives at the link's rate; nothing overlaps. The shares of `EFFICIENCY` are assumptions, printed with each plan.

The host counts too: `HOST_S` is what Python needs to submit one layer's forward and backward pass of one micro-batch,
as measured beside an H100 (docs/results.md: 57 ms for eight layers). A step takes the longer of both.
"""

from dataclasses import asdict, dataclass

from elas.config import Config, ffn_width, recompute_of
from elas.plan.counts import rank_parameters
from elas.plan.flops import BACKWARD, model_flops
from elas.plan.hardware import Machine
from elas.plan.traffic import Traffic

EFFICIENCY = {"full-rank products": 0.55, "factor products": 0.35, "2:4 FFN core": 0.35, "scores": 0.35,
              "head": 0.55, "memory": 0.75, "links": 0.75}  # fmt: skip
"""Share of the peak that each kind of work reaches."""
HOST_S = 7e-3
VALUES_MOVED = 40
"""Values of width h that element-wise work of a layer's passes reads or writes for each token: norms, rotary embedding,
residuals, and the gradients of each."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by what they go to."""

    products: float
    memory: float
    """Element-wise work and the update."""
    tensor: float
    """Collectives of tensor parallelism."""
    pipeline: float
    """Messages between stages."""
    bubble: float
    """Stages that wait."""
    data: float
    """Reduction of gradients, gathering of weights."""
    host: float
    """What Python needs beyond all of these."""

    @property
    def total(self) -> float:
        """Sum."""
        return sum(asdict(self).values())


def step_time(config: Config, world_size: int, machine: Machine, sent: Traffic) -> StepTime:
    """Estimate a step.

    Args:
        config: validated for `world_size` ranks.
        world_size: ranks, one a GPU.
        machine: of the cluster.
        sent: `elas.plan.traffic.traffic` of the same.
    """
    parallel, model, train = config.parallel, config.model, config.train
    t, p = parallel.tensor, parallel.pipeline
    d = world_size // (t * p)
    e = 4 if train.dtype == "float32" else 2
    tokens = train.global_batch_size // d * model.seq_length
    micro_batches = train.global_batch_size // (train.micro_batch_size * d)
    products = tokens * _product_seconds(config, machine) / t
    moved = VALUES_MOVED * model.hidden_size * e * model.num_layers / p / (t if parallel.sequence else 1)
    memory = (tokens * moved + 32 * rank_parameters(config)) / (machine.peak.bandwidth * EFFICIENCY["memory"])
    inside = machine.inside * EFFICIENCY["links"]
    between = machine.between * EFFICIENCY["links"]
    tensor = sent.tensor / (inside if t <= machine.gpus else between)
    pipeline = sent.pipeline / (inside if t * p <= machine.gpus else between)
    data = sent.data / (inside if world_size <= machine.gpus else between)
    busy = products + memory + tensor
    bubble = busy * (p - 1) / (parallel.virtual_pipeline * micro_batches)
    gpu = busy + pipeline + bubble + data
    host = HOST_S * model.num_layers / p * micro_batches * (1 + (p - 1) / (parallel.virtual_pipeline * micro_batches))
    return StepTime(products, memory, tensor, pipeline, bubble, data, max(0.0, host - gpu))


def _product_seconds(config: Config, machine: Machine) -> float:
    """Seconds of the products for a token on the stage that has most: of one tensor-parallel rank alone."""
    found, p = model_flops(config), config.parallel.pipeline
    rate = {kind: machine.peak.flops * share for kind, share in EFFICIENCY.items()}
    if config.train.dtype == "float32":
        rate = {kind: one / 2 for kind, one in rate.items()}  # TF32
    linear = rate["full-rank products" if config.low_rank.kind == "none" else "factor products"]
    gated = config.model.activation == "swiglu"
    ffn = linear if gated else rate["2:4 FFN core"]
    layers = (found.attention / linear + found.scores / rate["scores"] + found.ffn / ffn) / p
    passes = 1 + BACKWARD
    again = 0.0
    recompute = recompute_of(config)
    r, h, f = config.low_rank.rank, config.model.hidden_size, ffn_width(config)
    if recompute == "layer":
        again = layers
    elif recompute == "bottleneck":
        again = 2 * config.model.num_layers / p * r * (3 * h + (2 * f if gated else 0)) / linear
    if not gated and config.sparsity.ffn_memory == "fused":
        again += 2 * config.model.num_layers / p * f * (h if config.low_rank.kind == "none" else r) / ffn
    return passes * (layers + found.head / rate["head"]) + again
