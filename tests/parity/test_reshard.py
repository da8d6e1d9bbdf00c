"""A checkpoint is the model, not the layout: written by any, read by any other, to the last bit."""

import json
from pathlib import Path

import pytest
import reshard_run
import torch
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

LAYOUTS = {
    "one": (1, {"parallel.zero": 0}),
    "dp2-zero1": (2, {"parallel.zero": 1}),
    "dp2-zero2": (2, {"parallel.zero": 2}),
    "dp2-zero3": (2, {"parallel.zero": 3}),
    "dp4-zero3": (4, {"parallel.zero": 3}),
    "dp4-zero0": (4, {"parallel.zero": 0}),
    "tp2-zero1": (2, {"parallel.tensor": 2, "parallel.zero": 1}),
    "tp2-sp-zero1": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.zero": 1}),
    "tp2-zero3": (4, {"parallel.tensor": 2, "parallel.zero": 3}),
    "tp4": (4, {"parallel.tensor": 4, "parallel.zero": 0}),
    "pp2-zero1": (4, {"parallel.pipeline": 2, "parallel.zero": 1}),
    "pp2-interleaved": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.zero": 0}),
    "tp2-pp2-zero1": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1}),
}
PAIRS = [
    ("tp2-pp2-zero1", "dp4-zero3"),
    ("dp2-zero3", "tp2-sp-zero1"),
    ("pp2-interleaved", "tp4"),
    ("one", "dp2-zero1"),
    ("one", "dp4-zero3"),
    ("one", "tp4"),
    ("one", "tp2-pp2-zero1"),
    ("one", "pp2-interleaved"),
    ("one", "dp2-zero2"),
    ("tp2-zero3", "pp2-zero1"),
    ("dp4-zero0", "tp2-zero1"),
    ("dp2-zero2", "tp2-zero3"),
]
MODELS = {
    "loro": {"optimizer.kind": "loro", "optimizer.exact_every": 4},
    "muon": {"optimizer.kind": "muon", "optimizer.lr": 6e-3, "optimizer.lr_other": 3e-3},
    "spectron": {"optimizer.kind": "muon", "optimizer.lr": 0.025, "optimizer.normalize": "spectron"},
    "full-swiglu": {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none"},
    "tied-grouped": {"model.tie_embeddings": True, "model.num_query_groups": 2},
    "bf16": {"train.dtype": "bfloat16"},
}
WITH_MODELS = [
    ("loro", "tp2-pp2-zero1", "dp2-zero3"),
    ("loro", "dp2-zero3", "one"),
    ("muon", "tp2-pp2-zero1", "dp2-zero3"),
    ("muon", "dp2-zero3", "one"),
    ("muon", "one", "tp2-sp-zero1"),
    ("spectron", "tp2-pp2-zero1", "dp2-zero3"),
    ("spectron", "dp2-zero3", "one"),
    ("full-swiglu", "tp2-zero1", "dp4-zero3"),
    ("full-swiglu", "dp2-zero3", "tp4"),
    ("tied-grouped", "pp2-zero1", "tp2-zero1"),
    ("tied-grouped", "dp2-zero2", "tp2-pp2-zero1"),
    ("bf16", "dp2-zero2", "tp2-pp2-zero1"),
    ("bf16", "one", "dp2-zero3"),
    ("bf16", "tp2-zero3", "dp2-zero1"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Trains and saves on a layout, once; gives the run's folder and the loss of the step after."""
    done: dict = {}

    def save(layout: str, model: dict) -> tuple[str, float]:
        key = layout, json.dumps(model)
        if key not in done:
            folder = str(tmp_path_factory.mktemp(layout))
            world, overrides = LAYOUTS[layout]
            done[key] = folder, run_ranks(world, reshard_run.save, {**overrides, **model}, folder)[0]
        return done[key]

    return save


def check(saved, source: str, target: str, model: dict, folder: Path, tolerance: float) -> None:
    run_dir, want = saved(source, model)
    world, overrides = LAYOUTS[target]
    losses = run_ranks(world, reshard_run.load, {**overrides, **model}, run_dir, str(folder))
    assert losses[0] == pytest.approx(want, rel=tolerance)
    before, after = reshard_run.tensors(run_dir), reshard_run.tensors(str(folder))
    assert set(before) == set(after)
    assert len(before) % 3 == 0 or model.get("optimizer.kind") == "muon"  # which keeps one moment of a matrix
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert any(tensor.any() for name, tensor in before.items() if name.startswith("exp_avg_sq."))


@pytest.mark.parametrize("source, target", [*PAIRS, *(pair[::-1] for pair in PAIRS)])
def test_any_layout_reads_what_any_wrote(saved, tmp_path, source, target):
    check(saved, source, target, {}, tmp_path, 1e-6)


@pytest.mark.parametrize("model, source, target", WITH_MODELS)
def test_other_models(saved, tmp_path, model, source, target):
    check(saved, source, target, MODELS[model], tmp_path, 2e-4 if model == "bf16" else 1e-6)


def test_a_save_beside_training_holds_the_state_it_was_called_in(saved, tmp_path):
    run_dir, want = saved("tp2-zero3", {})
    world, overrides = LAYOUTS["tp2-zero3"]
    loss = run_ranks(world, reshard_run.save, {**overrides, "checkpoint.async_save": True}, str(tmp_path))[0]
    assert loss == want
    beside = reshard_run.tensors(str(tmp_path))
    for name, tensor in reshard_run.tensors(run_dir).items():
        assert torch.equal(tensor, beside[name]), name


@pytest.mark.parametrize("stage, dtype", [(0, "bfloat16"), (1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_a_save_notices_weights_that_are_not_the_models(tmp_path, stage, dtype):
    """Were DeepSpeed's memory misread, the save fails on every rank, and what was saved before stays."""
    settings = {"parallel.zero": stage, "train.dtype": dtype, "model.num_layers": 1}
    results = run_ranks(2, reshard_run.scrambled_save, settings, str(tmp_path))
    (error, kept, (same, other)), (elsewhere, *_) = results
    assert error == elsewhere and "differs from the model's weight" in error
    assert "checkpoint step_00000002 was not written" in error and "step_00000001" in error
    assert kept == ["step_00000001"]
    assert same is None and "differs from the model's" in other  # read from the files: weights of then, weights of now
