"""On a rank: some steps of a configuration on random tokens, and what they are seen to need."""

import contextlib
import dataclasses
import gc
import itertools
import time
from typing import Any

import torch
import torch.distributed as dist

from elas import accelerator, parallel
from elas.bench import measure
from elas.bench.account import Account, measure_step
from elas.bench.step_models import Batch, Ours
from elas.config import Config, load_config
from elas.config.deepspeed import choose_zero_stage
from elas.engine.engine import Engine
from elas.model.activation import set_step
from elas.model.provider import count_parameters
from elas.plan_check import host_rank, rates_rank
from elas.plan_check.watch import Clock, CountTraffic, copied_collectives, count_flops

LEARNING_RATE = 1e-5
"""So small that steps on one batch stay finite."""


def on_rank(facts: dict[str, Any]) -> dict[str, Any]:
    """What steps need on this rank.

    Args:
        facts: `source` and `overrides` (for `load_config`), `steps`, and `rates`: None, or facts of `rates_rank`, to
            measure rates before and after the timed steps; with `host`, what Python needs.
    """
    config = load_config(facts["source"], facts["overrides"])
    choose_zero_stage(config, parallel.world_size())
    layout = parallel.initialize(config.parallel, seed=config.train.seed, timeout_s=config.train.timeout_seconds)
    device, batch = accelerator.device(), _batch(config)
    with measure.Memory(device) as built:
        model = Ours(Engine(config, layout))
        model.engine.set_learning_rate(LEARNING_RATE)
        set_step(model.engine.chunks, 1)
        model.step(batch)
    chunks = model.engine.chunks
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    held = sum(parameter.numel() * parameter.element_size() for parameter in weights)
    found: dict[str, Any] = {
        "rank_parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in weights),
        "parameters": count_parameters(chunks),
        "weights": held,
        "optimizer": built.kept - held,
        "layers": len(chunks[0].decoder.layers),
    }
    before = _rates(facts)
    found["steps"] = _timed(model.engine, batch, facts["steps"], device)
    found["rates"] = [before, _rates(facts)] if before else []
    with CountTraffic() as count:
        loss, norm = model.step(batch)
    account = _account(model, batch, device, copies=layout.tp > 1)
    found |= {"traffic": count.sent, "loss": loss, "norm": norm, "account": dataclasses.asdict(account)}
    found |= {"peak": built.kept + account.peak}
    del model, chunks, weights
    gc.collect()  # engines have reference cycles
    return found | {"flops": _flops(config, layout, batch)}


def _rates(facts: dict[str, Any]) -> dict[str, Any] | None:
    wanted = facts.get("rates")
    return rates_rank.rates_here(wanted, host_rank.Host(**wanted["host"])) if wanted else None


def _batch(config: Config) -> Batch:
    shape = (config.train.micro_batch_size, config.model.seq_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(5))
    device = accelerator.device()
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def _timed(engine: Engine, batch: Batch, steps: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of each step on this rank: the whole, and parts of it."""
    rows = []
    with Clock(engine) as clock:
        for _ in range(steps + 1):
            dist.barrier()
            clock.reset()
            begun = time.perf_counter()
            measure.seconds(lambda: engine.step(itertools.repeat(batch)), device)
            rows.append({"step": time.perf_counter() - begun, **clock.seconds})
    return rows[1:]


def _account(model: Ours, batch: Batch, device: torch.device, *, copies: bool) -> Account:
    with copied_collectives() if copies and device.type == "cpu" else contextlib.nullcontext():
        return measure_step(lambda: model.step(batch), model, device)


def _flops(config: Config, layout: parallel.Layout, batch: Batch) -> float:
    """FLOPs of a step on this rank, with an FFN core whose products torch sees."""
    if config.model.activation == "relu2" and config.sparsity.ffn_memory != "eager":
        sparsity = dataclasses.replace(config.sparsity, implementation="torch")
        config = dataclasses.replace(config, sparsity=sparsity)
    engine = Engine(config, layout)
    engine.set_learning_rate(LEARNING_RATE)
    set_step(engine.chunks, 1)
    engine.step(itertools.repeat(batch))
    found: list[float] = []
    with count_flops(found):
        engine.step(itertools.repeat(batch))
    return found[0]
