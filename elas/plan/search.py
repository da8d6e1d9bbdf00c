"""Finds the layouts of a configuration that fit into a number of GPUs, and how long a step takes on each."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
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
    for candidate in _dividing(config, gpus, machine, kept):
        if not kept or kept.items() <= layout_settings(candidate).items():
            yield candidate


def _dividing(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object]) -> Iterator[Config]:
    """Layouts of powers of two, and of the numbers `kept`; ZeRO's stages, which are alike without data parallelism."""
    model, batch = config.model, config.train.global_batch_size
    groups = model.num_query_groups or model.num_attention_heads
    full_rank, virtual = config.low_rank.kind == "none", _powers(4, kept.get("parallel.virtual_pipeline"))
    for t in _powers(min(machine.gpus, gpus), kept.get("parallel.tensor")):
        if gpus % t or groups % t or model.vocab_size % t or ffn_width(config) % (4 * t):
            continue
        for p in (n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0):
            if gpus % (t * p) or batch % (gpus // (t * p)):
                continue
            each = batch // (gpus // (t * p))
            parts = [n for n in virtual if n == 1 or (p > 1 and model.num_layers % (p * n) == 0)]
            for sequence in {False, t > 1 and model.seq_length % t == 0}:
                for v, zero in product(parts, (0, 1) if p > 1 else (0, 1, 2) if model.tie_embeddings else (0, 1, 2, 3)):
                    if zero and gpus == t * p and "parallel.zero" not in kept:
                        continue
                    for recompute in ("none", "layer") if full_rank else ("none", "bottleneck", "layer"):
                        for m in _powers(each, kept.get("train.micro_batch_size")):
                            if each % m or (v > 1 and (each // m) % p):
                                continue
                            yield _with(config, t, p, v, sequence, zero, recompute, m)


def undivided(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> str:
    """Say why no layout divides so many GPUs: what is given, or their number, with the nearest that some layout has."""
    given = ", ".join(f"--{key} {word(value)}" for key, value in kept.items())
    if kept and any(candidates(config, gpus, machine)):
        return f"{given}: no layout of {gpus_in_words(gpus)} has that: {_refusal(config, gpus, kept)}"
    near = _nearest(config, gpus, machine, kept)
    fix = near or _nearest(config, gpus, machine) or "another train.global_batch_size"
    fix += f", and leave out {given}" if kept and not near else ""
    batch, layers = config.train.global_batch_size, config.model.num_layers
    ranks = f"{layers} layers and a global batch of {batch:,} samples (train.global_batch_size)"
    return f"--gpus {gpus:,}: no layout divides {ranks} among so many; give {fix}"


def _nearest(config: Config, gpus: int, machine: Machine, kept: Mapping[str, object] = FREE) -> str:
    """The nearest numbers of GPUs, below and above, that have a layout; empty if there is none."""
    numbers = [range(gpus - 1, 0, -1), range(gpus + 1, 2 * gpus + 1)]
    near = [next((n for n in way if any(candidates(config, n, machine, kept))), None) for way in numbers]
    return " or ".join(f"{n:,}" for n in near if n)


def _refusal(config: Config, gpus: int, kept: Mapping[str, object]) -> str:
    """Which rule the settings `kept` break in the plainest layout that has them."""
    plain = _with(config, 1, 1, 1, False, 0, "none", 1)
    sections: dict[str, dict[str, object]] = {"parallel": {}, "train": {}}
    for key, value in kept.items():
        section, name = key.split(".")
        sections[section][name] = value
    changed: dict = {name: dataclasses.replace(getattr(plain, name), **values) for name, values in sections.items()}
    try:
        validate(dataclasses.replace(plain, **changed), gpus)
    except UserError as error:
        return str(error)
    return "leave it out or give another"


def word(value: object) -> str:
    """A setting's value as one writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def gpus_in_words(gpus: int) -> str:
    """`1 GPU`, `1,024 GPUs`."""
    return f"{gpus:,} GPU{'' if gpus == 1 else 's'}"


def _with(config: Config, t: int, p: int, v: int, sequence: bool, zero: int, recompute: str, m: int) -> Config:
    sizes = {"tensor": t, "pipeline": p, "virtual_pipeline": v, "sequence": sequence, "zero": zero}
    parallel = dataclasses.replace(config.parallel, deepspeed_config=None, **sizes)
    recomputed: dict = {"recompute": recompute}
    train = dataclasses.replace(config.train, micro_batch_size=m, **recomputed)
    return dataclasses.replace(config, parallel=parallel, train=train)


def _powers(most: int, also: object = None) -> list[int]:
    """Powers of two up to `most`, and `also` if it is another number."""
    found = [2**n for n in range(most.bit_length()) if 2**n <= most]
    return [*found, also] if isinstance(also, int) and also not in found else found
