"""Estimated time of a training step; no GPU is needed.

Each term is work over a rate (`elas.plan.rates`): products by kind, element-wise work, the update's passes over memory,
collectives by their bytes and their number, and Python. On a data sheet's machine the rates are assumed shares of its
peaks; on one that `elas plan --measure` has looked at they are measured. Nothing overlaps, except Python with a GPU: a
step takes the longer of both. A CPU runs Python itself, so there the two add up.

Stages differ: the first has the embedding, the last the head. With 1F1B a step takes as long as the slowest stage needs
for all micro-batches, and the others need for one; interleaving divides the latter.

`HOST_S` of `elas.plan.rates` was measured beside an H100 (docs/results.md: 57 ms for eight layers).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from elas.config import Config, ffn_width, recompute_of
from elas.config.deepspeed import read_deepspeed_json, zero_stage
from elas.plan.counts import layer_parameters, rank_parameters
from elas.plan.flops import BACKWARD, again_work, layer_work
from elas.plan.hardware import Machine
from elas.plan.muon import iteration_flops
from elas.plan.rates import EFFICIENCY, KINDS, Link, Rates, assumed
from elas.plan.traffic import Traffic, data_calls, tensor_calls, traffic_by_kind

ASSUMED_LATENCY_S = 15e-6
"""Of a collective, where it was not measured."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by what they go to."""

    products: float
    memory: float
    """Element-wise work, the embedding's gradient, sums of gradients over micro-batches."""
    tensor: float
    """Collectives of tensor parallelism."""
    pipeline: float
    """Messages between stages."""
    bubble: float
    """Stages that wait."""
    data: float
    """Reduction of gradients, gathering of weights."""
    update: float
    """Norm, optimizer and the copies of ZeRO."""
    host: float
    """Python: beside a GPU what it needs beyond all of these."""

    @property
    def total(self) -> float:
        """Sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch's passes on one pipeline stage."""

    products: float
    memory: float
    tensor: float
    host: float

    @property
    def total(self) -> float:
        return self.products + self.memory + self.tensor + self.host


@dataclass(frozen=True)
class _Pace:
    """Rates of one layout on one machine."""

    rates: Rates
    links: dict[str, Link]
    """Of the tensor-parallel group, by kind."""
    shared: float
    """Ranks for each core, at least 1: time that everything takes longer."""
    overlaps: bool
    """Whether Python runs beside the device."""


def step_time(config: Config, world_size: int, machine: Machine, sent: Traffic) -> StepTime:
    """Estimate a step.

    Args:
        config: validated for `world_size` ranks.
        world_size: ranks, one a GPU.
        machine: of the cluster.
        sent: `elas.plan.traffic.traffic` of the same.
    """
    parallel, train = config.parallel, config.train
    p, v = parallel.pipeline, parallel.virtual_pipeline
    d = world_size // (parallel.tensor * p)
    micro_batches = train.global_batch_size // (train.micro_batch_size * d)
    pace = _pace(config, world_size, machine)
    tensor, _, data = traffic_by_kind(config, world_size)
    ends = {"first": p > 1, "middle": p > 2, "last": p > 1, "all": p == 1}
    stages = {name: _stage(config, pace, name, tensor, micro_batches) for name, there in ends.items() if there}
    slowest = max(stages.values(), key=lambda one: one.total)
    fill = sum(one.total * ((p - 2) if name == "middle" else 1) for name, one in stages.items()) - slowest.total
    # The others wait for the slowest part of the time, in which it has the machine to itself.
    alone = _alone(config, machine, pace)
    idle = 1 - fill / ((p - 1) * slowest.total) if p > 1 else 0.0
    steady = micro_batches * (1 - idle * (1 - alone))
    reduction = _reduction(config, world_size, machine, data, micro_batches)
    update = _update(config, pace.rates, d, micro_batches)
    times = StepTime(
        products=steady * slowest.products,
        memory=steady * slowest.memory,
        tensor=steady * slowest.tensor,
        pipeline=pace.shared * _messages(config, machine, sent, micro_batches),
        bubble=alone * fill / v,
        data=pace.shared * (reduction + _exchange(world_size, machine, sent)),
        update=pace.shared * (update + _iterations(config, pace.rates, world_size, machine.device)),
        host=steady * slowest.host + pace.shared * pace.rates.host_step_s,
    )
    return _beside_gpu(times, p, v, micro_batches) if pace.overlaps else times


def _messages(config: Config, machine: Machine, sent: Traffic, micro_batches: int) -> float:
    """Seconds of messages between stages."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    link = _links(machine, within=parallel.tensor * parallel.pipeline <= machine.gpus)["send"]
    return sent.pipeline / link.bytes_per_s + 2 * parallel.virtual_pipeline * micro_batches * link.latency_s


def _reduction(config: Config, world_size: int, machine: Machine, data: dict[str, float], micro_batches: int) -> float:
    """Seconds of collectives over data-parallel ranks; `data`: bytes by kind."""
    if not data:
        return 0.0
    links = _links(machine, within=world_size <= machine.gpus)
    calls = data_calls(config, _zero(config), micro_batches)
    return sum(size / links[kind].bytes_per_s for kind, size in data.items()) + calls * links["all_reduce"].latency_s


def _exchange(world_size: int, machine: Machine, sent: Traffic) -> float:
    """Seconds in which Muon's matrices go to their owners and come back, two all-to-alls."""
    if not sent.matrices:
        return 0.0
    link = _links(machine, within=world_size <= machine.gpus)["all_gather"]
    return sent.matrices / link.bytes_per_s + 2 * link.latency_s


def _iterations(config: Config, rates: Rates, world_size: int, device: str) -> float:
    """Seconds in which a rank orthogonalizes the matrices that it owns."""
    if config.optimizer.kind != "muon":
        return 0.0
    return iteration_flops(config, device) / (world_size // config.parallel.pipeline) / rates.iteration


def _zero(config: Config) -> int:
    return zero_stage(read_deepspeed_json(config))


def _beside_gpu(times: StepTime, p: int, v: int, micro_batches: int) -> StepTime:
    """The same with Python beside the GPU: the step takes the longer of both."""
    python = times.host * (1 + (p - 1) / (v * micro_batches))
    return replace(times, host=max(0.0, python - (times.total - times.host)))


def _pace(config: Config, world_size: int, machine: Machine) -> _Pace:
    within, measured = config.parallel.tensor <= machine.gpus, machine.measured
    links = _links(machine, within=within)
    if measured is None:
        return _Pace(_assumed(machine, config.train.dtype), links, 1.0, overlaps=True)
    rates = measured.rates(world_size, config.train.dtype)
    return _Pace(rates, links, max(1.0, world_size / measured.ranks), overlaps=measured.device == "cuda")


@lru_cache(maxsize=64)
def _assumed_rates(flops: float, bandwidth: float, fp64: float, dtype: str) -> Rates:
    return assumed(flops, bandwidth, fp64, dtype)


def _assumed(machine: Machine, dtype: str) -> Rates:
    return _assumed_rates(machine.peak.flops, machine.peak.bandwidth, machine.peak.fp64, dtype)


def _links(machine: Machine, *, within: bool) -> dict[str, Link]:
    """Links by kind: within a node, or to other nodes; those that were measured are of one machine."""
    if machine.measured is not None:
        return machine.measured.links or dict.fromkeys(KINDS, Link(float("inf"), 0.0))
    rate = (machine.inside if within else machine.between) * EFFICIENCY["links"]
    return dict.fromkeys(KINDS, Link(rate, ASSUMED_LATENCY_S))


def _alone(config: Config, machine: Machine, pace: _Pace) -> float:
    """Time of products of a rank that has the machine to itself, over that of one among many; 1 if not measured."""
    if machine.measured is None:
        return 1.0
    one = machine.measured.rates(1, config.train.dtype)
    return min(1.0, pace.rates.head / one.head)


def _stage(config: Config, pace: _Pace, name: str, tensor: dict[str, float], micro_batches: int) -> _Stage:
    """Seconds of one micro-batch on the stage `name`: first, middle, last, or all."""
    rates, parallel, model = pace.rates, config.parallel, config.model
    t, layers = parallel.tensor, model.num_layers // parallel.pipeline
    e = 4 if config.train.dtype == "float32" else 2
    tokens = config.train.micro_batch_size * model.seq_length
    products = tokens * layers * layer_seconds(config, rates)
    memory = tokens * layers * _element_wise(config, rates)
    table = model.vocab_size * model.hidden_size / t
    if name in ("last", "all"):
        products += tokens * (1 + BACKWARD) * 2 * table / rates.head
    if name in ("first", "all"):
        memory += e * (table / rates.fresh + 3 * tokens * model.hidden_size / rates.bandwidth)  # zeros, then rows
    summed = (2 * 4 + e if e == 2 else 3 * 4) * (micro_batches - 1) / micro_batches
    memory += summed * rank_parameters(config) / rates.bandwidth
    per_layer, at_ends = tensor_calls(config)
    sent = sum(size / pace.links[kind].bytes_per_s for kind, size in tensor.items()) / micro_batches
    if t > 1:
        sent += (per_layer * layers + at_ends) * pace.links["all_reduce"].latency_s
    more = 4 / 3 if recompute_of(config) == "layer" else 1.0
    host = layers * rates.host_layer_s * more + rates.host_batch_s
    shared = pace.shared
    return _Stage(shared * products, shared * memory, shared * sent, shared * host)


def layer_seconds(config: Config, rates: Rates) -> float:
    """Seconds of one token's products in one layer, both passes and what is computed again."""
    full_rank = config.low_rank.kind == "none"
    rank = config.model.hidden_size if full_rank else config.low_rank.rank
    linear = rates.full_rank if full_rank else rates.of_rank(rates.factor, rank)
    core, once, again = rates.of_rank(rates.core, rank), layer_work(config), again_work(config)
    passes = 1 + BACKWARD
    return (
        (passes * once.linear + again.linear) / linear
        + (passes * once.core + again.core) / core
        + (passes * once.scores + again.scores) / rates.scores
    )


def _element_wise(config: Config, rates: Rates) -> float:
    """Seconds of one token's element-wise work in one layer, on one tensor-parallel rank."""
    parallel, model = config.parallel, config.model
    h, t = model.hidden_size, parallel.tensor
    found = rates.norm_s * h / (t if parallel.sequence else 1) + rates.heads_s * h / t
    if model.activation == "swiglu":
        found += rates.gate_s * ffn_width(config) / t
    return found * (1 if recompute_of(config) == "none" else 4 / 3)  # the forward pass again


def _update(config: Config, rates: Rates, d: int, micro_batches: int) -> float:
    """Seconds of the update: AdamW of a rank's part, and passes over its gradients and weights.

    Bytes for each parameter, in fp32 and in bf16: at ZeRO 0 the norm squares a copy (12 or 16), and clips in place (8);
    bf16 gradients become fp32 ones (6), masters bf16 weights (6); over ranks they are made flat, divided and copied
    back (24). ZeRO copies gradients into a bucket and divides it (16) with each reduction, and takes its part out of
    it, whose norm it computes and which it scales (28); updated weights are copied back (8 or 6). Temporary tensors of
    the size of a table, and flat ones, are obtained from the system each time: squares, fp32 copies, ZeRO's part.
    """
    e = 4 if config.train.dtype == "float32" else 2
    held, stage = rank_parameters(config), _zero(config)
    part = held / d if stage else held
    tables = held - config.model.num_layers // config.parallel.pipeline * layer_parameters(
        config, config.parallel.tensor
    )
    if stage == 0:
        moved = held * (12 + 8 if e == 4 else 16 + 8 + 6 + 6) + (held * 24 if d > 1 else 0)
        fresh = tables * (4 if e == 4 else 4 + 4 + 4 + 2) + (held * 4 if d > 1 else 0)
    else:
        reductions = 1 if stage == 1 else micro_batches
        moved = held * (16 * reductions + 4 + e) + part * (28 + 4 + e)
        fresh = part * (4 + 4)
    return part * rates.adam_s + moved / rates.bandwidth + fresh / rates.fresh
