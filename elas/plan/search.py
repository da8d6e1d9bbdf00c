"""Finds the layouts of a configuration that fit into a number of GPUs, and how long a step takes on each."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from elas.config import Config, ffn_width, recompute_of
from elas.config.rules import validate
from elas.errors import UserError
from elas.plan.flops import model_flops
from elas.plan.hardware import Machine
from elas.plan.memory import Memory, estimate
from elas.plan.muon import check_sub_groups
from elas.plan.step_time import StepTime, step_time
from elas.plan.traffic import Traffic, traffic

USABLE = 0.9
"""Share of the rest that a plan may use: allocators leave gaps, and temporary tensors are not in the formulas."""
FREE: Mapping[str, object] = MappingProxyType({})
"""No setting that layouts must have."""


@dataclass(frozen=True)
class Plan:
    """One layout."""

    config: Config
    gpus: int
    memory: Memory
    traffic: Traffic
    time: StepTime
    fits: bool
    context: float
    """Bytes of each GPU besides (`Machine.context`); of a CPU's rank those of the process."""

    @property
    def bytes(self) -> float:
        """Of a GPU, on the rank that needs most."""
        return self.memory.total - self.memory.runtime + self.context

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs."""
        return self.config.train.global_batch_size * self.config.model.seq_length / self.time.total

    def mfu(self, machine: Machine) -> float:
        """Model FLOPs over time and the dense peak."""
        return self.tokens_per_s * model_flops(self.config).training / (self.gpus * machine.peak.flops)

    @property
    def settings(self) -> dict[str, object]:
        """What the layout sets, by key."""
        return layout_settings(self.config)


def layout_settings(config: Config) -> dict[str, object]:
    """The settings that layouts differ in, by key."""
    parallel, train = config.parallel, config.train
    return {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence": parallel.sequence,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.zero": parallel.zero,
        "train.micro_batch_size": train.micro_batch_size,
        "train.recompute": recompute_of(config),
    }


def plans(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> list[Plan]:
    """Every layout that divides, the fastest that fits first, then those that do not fit, the smallest first.

    Args:
        config: whose layout is searched.
        gpus: number of them.
        machine: what they are.
        kept: settings that every layout must have, of those of `layout_settings`.
    """
    found = []
    for candidate in candidates(config, gpus, machine, kept):
        memory, sent = estimate(candidate, gpus, machine.device), traffic(candidate, gpus)
        context = machine.context if machine.device == "cuda" else memory.runtime
        fits = memory.total - memory.runtime <= USABLE * (machine.memory - context)
        found.append(Plan(candidate, gpus, memory, sent, step_time(candidate, gpus, machine, sent), fits, context))
    return sorted(found, key=_rank)


def _rank(plan: Plan) -> tuple:
    if not plan.fits:
        return True, plan.bytes
    # Where the host is what takes time, the layout that leaves the GPU most of it is as fast, and will stay so.
    return False, round(plan.time.total, 6), plan.time.total - plan.time.host, plan.bytes


def best(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> Plan | None:
    """The fastest layout that fits and is valid; None if nothing fits. Arguments as of `plans`.

    Raises:
        UserError: every layout that fits breaks a rule, such as one between settings that no layout changes.
    """
    refused: UserError | None = None
    for plan in plans(config, gpus, machine, kept):
        if not plan.fits:
            break
        try:
            validate(plan.config, gpus)
            check_sub_groups(plan.config, gpus)
        except UserError as error:  # a rule that the enumeration does not know
            refused = refused or error
            continue
        return plan
    if refused is not None:
        raise refused
    return None


def candidates(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> Iterator[Config]:
    """Configurations of every layout that divides the model, the batch and the GPUs, and has the settings `kept`."""
    for candidate in _dividing(config, gpus, machine):
        settings = layout_settings(candidate)
        if all(settings[key] == value for key, value in kept.items()):
            yield candidate


def _dividing(config: Config, gpus: int, machine: Machine) -> Iterator[Config]:
    model, batch = config.model, config.train.global_batch_size
    groups = model.num_query_groups or model.num_attention_heads
    full_rank = config.low_rank.kind == "none"
    for t in _powers(min(machine.gpus, gpus)):
        if gpus % t or groups % t or model.vocab_size % t or ffn_width(config) % (4 * t):
            continue
        for p in (n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0):
            if gpus % (t * p) or batch % (gpus // (t * p)):
                continue
            each = batch // (gpus // (t * p))
            for sequence in {False, t > 1 and model.seq_length % t == 0}:
                for v in (n for n in (1, 2, 4) if n == 1 or (p > 1 and model.num_layers % (p * n) == 0)):
                    for zero in (0, 1) if p > 1 else (0, 1, 2) if model.tie_embeddings else (0, 1, 2, 3):
                        if zero and gpus == t * p:
                            continue
                        for recompute in ("none", "layer") if full_rank else ("none", "bottleneck", "layer"):
                            for m in _powers(each):
                                if each % m or (v > 1 and (each // m) % p):
                                    continue
                                yield _with(config, t, p, v, sequence, zero, recompute, m)


def undivided(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> str:
    """Say that no layout divides so many GPUs, with the nearest numbers that some layout divides."""
    given = ", ".join(f"--{key} {value}" for key, value in kept.items())
    if kept and any(candidates(config, gpus, machine)):
        return f"{given}: no layout of {gpus:,} GPUs has that; leave it out or give another"
    numbers = [range(gpus - 1, 0, -1), range(gpus + 1, 2 * gpus + 1)]
    near = [next((n for n in way if any(candidates(config, n, machine, kept))), None) for way in numbers]
    fix = " or ".join(f"{n:,}" for n in near if n) or "another train.global_batch_size"
    fix += f", or leave out {given}" if kept else ""
    batch, layers = config.train.global_batch_size, config.model.num_layers
    ranks = f"{layers} layers and a global batch of {batch:,} samples (train.global_batch_size)"
    return f"--gpus {gpus:,}: no layout divides {ranks} among so many; give {fix}"


def _with(config: Config, t: int, p: int, v: int, sequence: bool, zero: int, recompute: str, m: int) -> Config:
    sizes = {"tensor": t, "pipeline": p, "virtual_pipeline": v, "sequence": sequence, "zero": zero}
    parallel = dataclasses.replace(config.parallel, deepspeed_config=None, **sizes)
    recomputed: dict = {"recompute": recompute}
    train = dataclasses.replace(config.train, micro_batch_size=m, **recomputed)
    return dataclasses.replace(config, parallel=parallel, train=train)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]
