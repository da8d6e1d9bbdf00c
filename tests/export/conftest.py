"""Trained models and their exports, made once for all tests of this folder."""

import os
from pathlib import Path

import pytest
import torch
import trained_exports
from support.made_once import made_once
from support.ranks import run_ranks
from trained_exports import Trained

GROUPED = {"model.num_query_groups": 2}
SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}
FULL = {"low_rank.kind": "none"}
COLA = {"low_rank.kind": "cola"}
TP2PP2 = (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1})
ZERO3 = (2, {"parallel.zero": 3})
ONE = (1, {"parallel.zero": 0, "train.micro_batch_size": 8})

CASES = {
    "elas-grouped": (TP2PP2, GROUPED),
    "elas-soft": (ZERO3, {"sparsity.method": "soft_threshold", "sparsity.scale": 1.5}),
    "elas-bf16": (ONE, {"train.dtype": "bfloat16"}),
    "lowrank-relu2": (ONE, {**GROUPED, "sparsity.kind": "none"}),
    "lowrank-swiglu": (ONE, SWIGLU),
    "elas-tied": (ONE, {"model.tie_embeddings": True, "model.rotary_base": 500}),
    "cola-silu": (ONE, {**COLA, **SWIGLU}),
    "cola-relu2": (ONE, {**COLA, "low_rank.activation": "relu2", "model.activation": "swiglu"}),
    "full-relu2": (ONE, {**FULL, **GROUPED}),
    "full-swiglu": (ONE, {**FULL, **SWIGLU, **GROUPED, "model.tie_embeddings": True}),
    "not-yet-sparse": (ONE, {"sparsity.dense_steps": 50}),
}
ROWS = 8
NEW = {"elas-grouped": 256}
LEAST_NEW = int(os.environ.get("ELAS_TEST_NEW_TOKENS", "40"))
"""Tokens to continue a prompt by; `ELAS_TEST_NEW_TOKENS=256 pytest tests/export/test_forms.py` takes that for all."""


DENSE = {name for name in CASES if name.startswith(("lowrank-", "full-s", "cola-", "not-")) or name == "elas-grouped"}


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    """Tokens to compare logits on, int64 `[8, 256]`."""
    return torch.randint(256, (ROWS, 256), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def prompt(rows) -> torch.Tensor:
    """Tokens to continue, int64 `[1, 8]`."""
    return rows[:1, :8]


@pytest.fixture(scope="session")
def models(tmp_path_factory, rows, prompt) -> dict[str, Trained]:
    """Every one of `CASES` by its name: trained for 50 steps, most of them sparse, and exported."""
    return made_once(tmp_path_factory, "models", lambda folder: _train_all(folder, rows, prompt))


def _train_all(folder: Path, rows: torch.Tensor, prompt: torch.Tensor) -> dict[str, Trained]:
    losses: dict[str, float] = {}
    for world, layout in (TP2PP2, ZERO3, ONE):
        cases = {name: {**layout, **more} for name, (where, more) in CASES.items() if where == (world, layout)}
        losses |= run_ranks(world, trained_exports.train, cases, str(folder), timeout=300)[-1]
    asked = {
        str(folder / name): (["elas", "dense"] if name in DENSE else ["elas"], NEW.get(name, LEAST_NEW))
        for name in CASES
    }
    (ours,) = run_ranks(1, trained_exports.run_ours, asked, rows, prompt, timeout=300)
    made = {}
    for name in CASES:
        found = ours[str(folder / name)]
        logits, text = found.pop("logits"), found.pop("text")
        made[name] = Trained(folder / name, losses[name], logits, text, found)
    return made
