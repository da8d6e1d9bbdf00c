"""What a plan is compared with: the same shape at full rank, and at low rank without 2:4."""

import dataclasses
from typing import Any

from elas.config import Config
from elas.config.schema import OWN_SETTINGS, OptimizerConfig
from elas.plan.counts import gated_width


def rivals_of(config: Config) -> dict[str, Config]:
    """The same shape at full rank, and at low rank without 2:4."""
    model, sparsity = config.model, config.sparsity
    gated: dict[str, Any] = {"activation": "swiglu"}
    if config.model.activation != "swiglu":
        gated["ffn_hidden_size"] = gated_width(config)
    none: dict[str, Any] = {"kind": "none"}
    loro = config.optimizer.kind == "loro"
    own = {name: getattr(OptimizerConfig(), name) for name in OWN_SETTINGS["loro"]}
    adamw: dict[str, Any] = {"kind": "adamw", **own} if loro else {}
    schedule: dict[str, Any] = {"kind": "cosine"} if loro and config.schedule.kind == "cosine_restart" else {}
    full = dataclasses.replace(
        config,
        model=dataclasses.replace(model, **gated),
        low_rank=dataclasses.replace(config.low_rank, **none),
        sparsity=dataclasses.replace(sparsity, **none),
        optimizer=dataclasses.replace(config.optimizer, **adamw),
        schedule=dataclasses.replace(config.schedule, **schedule),
        train=dataclasses.replace(config.train, recompute=None),
    )
    kept: dict[str, Any] = {"ffn_memory": "eager"}
    dense = dataclasses.replace(config, sparsity=dataclasses.replace(sparsity, **none, **kept))
    found = {}
    if config.low_rank.kind != "none":
        found["full rank"] = full
    if config.sparsity.kind != "none" and config.low_rank.kind != "none":
        found["low rank"] = dense
    return found


def kept_by(rival: Config, kept: dict[str, object]) -> dict[str, object]:
    """What a rival's layouts must have: the same, but that full rank has no bottleneck to recompute from."""
    free = rival.low_rank.kind == "none" and kept.get("train.recompute") == "bottleneck"
    return {key: value for key, value in kept.items() if not (free and key == "train.recompute")}
