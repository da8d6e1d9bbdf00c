"""Predicted beside measured, component by component, and which of them must agree.

| must agree | within |
|---|---|
| parameters, of all and of the rank with most | equal |
| bytes that a layer keeps for the backward pass | 1 % |
| bytes that a rank sends, by kind | 0.1 %, or 300 bytes: a few numbers that all ranks exchange are in no formula |
| FLOPs of all ranks | 2 % |

Memory besides and times are shown beside each other.
"""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from elas.config import Config
from elas.plan.counts import parameter_count, rank_parameters
from elas.plan.flops import hardware_flops
from elas.plan.hardware import Machine
from elas.plan.memory import estimate, token_bytes
from elas.plan.muon import iteration_flops
from elas.plan.step_time import StepTime, step_time
from elas.plan.traffic import traffic


@dataclass(frozen=True)
class Component:
    """One figure; `within` is the share by which the two may differ, None where they need not agree."""

    name: str
    unit: str
    predicted: float
    measured: float | None
    within: float | None = None
    spare: float = 0.0
    """May differ by so much in any case."""

    @property
    def agrees(self) -> bool:
        """Whether they are close enough, or need not be."""
        if self.within is None or self.measured is None:
            return True
        return abs(self.measured - self.predicted) <= max(self.within * abs(self.measured), self.spare)

    @property
    def off(self) -> float | None:
        """How much the prediction is too large, as a share of the measured."""
        if not self.measured:
            return None
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "agrees": self.agrees, "off": self.off}


def components(config: Config, world: int, machine: Machine, ranks: list[dict[str, Any]]) -> list[Component]:
    """All components.

    Args:
        config: as it was run, with its ZeRO stage chosen.
        world: number of ranks.
        machine: measured.
        ranks: what `check_rank` found, by rank.
    """
    time = step_time(config, world, machine, traffic(config, world))
    return [
        *_exact(config, world, machine.device, ranks),
        *_memory(config, world, machine, ranks),
        *_times(time, machine, ranks),
    ]


def _exact(config: Config, world: int, device: str, ranks: list[dict[str, Any]]) -> list[Component]:
    train, tokens = config.train, config.train.global_batch_size * config.model.seq_length
    e = 4 if train.dtype == "float32" else 2
    dp = world // (config.parallel.tensor * config.parallel.pipeline)
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    each = token_bytes(config, e) * train.micro_batch_size * config.model.seq_length
    kept = max(one["account"]["layers"] / one["layers"] for one in ranks) / micro_batches
    sent = asdict(traffic(config, world))
    muon = config.parallel.pipeline * iteration_flops(config, device) if config.optimizer.kind == "muon" else 0.0
    return [
        Component("parameters", "", parameter_count(config), ranks[0]["parameters"], 0.0),
        Component("parameters of a rank", "", rank_parameters(config), _most(ranks, "rank_parameters"), 0.0),
        Component("kept by a layer", "B", each, kept, 0.01),
        *(
            Component(f"sent, {kind}", "B", size, max(one["traffic"][kind] for one in ranks), 1e-3, 300.0)
            for kind, size in sent.items()
            if kind != "matrices"
        ),
        # The mean: where ZeRO's partitions begin and end, one rank sends more than another.
        Component("sent, matrices", "B", sent["matrices"], _mean(ranks, "matrices"), 0.05, 300.0),
        Component("FLOPs", "FLOP", hardware_flops(config) * tokens + muon, sum(one["flops"] for one in ranks), 0.02),
    ]


def _memory(config: Config, world: int, machine: Machine, ranks: list[dict[str, Any]]) -> list[Component]:
    predicted = estimate(config, world, machine.device)
    accounts = [one["account"] for one in ranks]
    parts_known = machine.device == "cpu" and config.parallel.virtual_pipeline == 1
    gradients = max(one["gradients"] for one in accounts) if parts_known else None
    head = max(one["head"] for one in accounts) if parts_known else None
    return [
        Component("weights", "B", predicted.weights, _most(ranks, "weights")),
        Component("optimizer", "B", predicted.optimizer, _most(ranks, "optimizer")),
        Component("gradients", "B", predicted.gradients, gradients),
        Component("head and loss", "B", predicted.head, head),
        Component("peak", "B", predicted.total - predicted.runtime, _most(ranks, "peak")),
    ]


def _mean(ranks: list[dict[str, Any]], kind: str) -> float:
    return statistics.mean(one["traffic"][kind] for one in ranks)


def _most(ranks: list[dict[str, Any]], name: str) -> float:
    return max(one[name] for one in ranks)


def _times(time: StepTime, machine: Machine, ranks: list[dict[str, Any]]) -> list[Component]:
    """Medians over steps; the parts are those of the rank whose passes take longest."""
    steps = [max(row["step"] for row in rows) for rows in zip(*(one["steps"] for one in ranks))]
    total = Component("step", "s", time.total, statistics.median(steps))
    if machine.device == "cuda":
        return [total]
    medians = [
        {name: statistics.median(row[name] for row in one["steps"]) for name in one["steps"][0]} for one in ranks
    ]
    passes = [one["step"] - one["collectives"] - one["messages"] - one["update"] for one in medians]
    slowest = medians[passes.index(max(passes))]
    return [
        Component("forward and backward", "s", time.products + time.memory + time.host, max(passes)),
        Component("collectives", "s", time.tensor + time.data, slowest["collectives"]),
        Component("messages and bubble", "s", time.pipeline + time.bubble, slowest["messages"]),
        Component("update", "s", time.update, slowest["update"]),
        total,
    ]
