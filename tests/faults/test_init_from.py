"""`checkpoint.init_from`: the weights of another run on any layout, and nothing else of it."""

import json
import shutil
from pathlib import Path

import initial_run
import pytest
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks
from support.training_processes import rows

from elas.checkpoint.choose import find_checkpoint
from elas.checkpoint.initial import find_initial
from elas.config import load_config
from elas.errors import ConfigError

pytestmark = pytest.mark.timeout(600)

TP2 = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.zero": 0}
ZERO3 = {"parallel.zero": 3}
LORO = {"optimizer.kind": "loro", "optimizer.exact_every": 3}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> dict:
    """A run of 10 steps on tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("first")
    settings = {**SMALL, "data.train": write_corpus(folder / "text"), "data.valid": write_corpus(folder / "held-out")}
    settings |= {"train.run_dir": str(folder / "run"), "train.timeout_seconds": None, "train.eval_batches": 50}
    run_ranks(2, initial_run.train, {**settings, **TP2}, timeout=200)
    return settings


def manifest(run_dir, step: int) -> dict:
    return json.loads(Path(run_dir, f"checkpoints/step_{step:08d}/manifest.json").read_text())


@pytest.mark.parametrize(
    "world, layout",
    [(2, ZERO3), (2, {"parallel.pipeline": 2, "parallel.zero": 1, **LORO}), (1, {"train.dtype": "bfloat16"})],
    ids=["zero3", "pipeline-loro", "one-bf16"],
)
def test_a_run_begins_with_the_weights_of_another(first, tmp_path, world, layout):
    """The validation before the first step is the other run's last: within 1e-6 in fp32, 1e-3 in bf16."""
    source, run_dir = first["train.run_dir"], tmp_path / "run"
    other = {"data.train": write_corpus(tmp_path / "other", seed=7), "train.seed": 5, "schedule.kind": "constant"}
    settings = {**first, **other, **layout, "train.run_dir": str(run_dir), "train.steps": 4}
    settings |= {"checkpoint.init_from": source, "optimizer.lr": 1e-4, "sparsity.dense_steps": 0}
    _, shown = run_ranks(world, initial_run.train, settings, timeout=200)[0]
    step = f"{source}/checkpoints/step_00000010"
    assert f"starting with the weights of {step} (step 10); all other state is new" in shown
    within = 1e-3 if "train.dtype" in layout else 1e-6
    began, ended = rows(run_dir, "validation")[0], rows(Path(source), "validation")[-1]
    assert began["step"] == 0 and began["loss"] == pytest.approx(ended["loss"], rel=within)
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]
    assert rows(run_dir)[0]["lr"] == pytest.approx(0.5e-4)  # the warm-up of two steps, anew
    facts = manifest(run_dir, 4)
    assert facts["init_from"] == {"given": source, "checkpoint": step, "step": 10}
    assert facts["consumed_samples"] == 32 and facts["optimizer_step"] == (1 if "optimizer.kind" in layout else 4)

    # Killed after step 3: the same command goes on with its own checkpoint; the other run may be gone by then.
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    _, shown = run_ranks(world, initial_run.train, {**settings, "train.steps": 5}, timeout=200)[0]
    assert "at step 3" in shown and "begins with" not in shown
    assert manifest(run_dir, 5)["init_from"] == facts["init_from"]
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5]


def refused(settings: dict) -> str:
    config = load_config(None, settings)
    with pytest.raises(ConfigError) as caught:
        find_initial(config, find_checkpoint(config))
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_its_key(first, tmp_path):
    source = first["train.run_dir"]
    new = {**first, "train.run_dir": str(tmp_path / "run"), "checkpoint.init_from": source}
    for key, value, expected in (
        (
            "model.hidden_size",
            128,
            "have model.hidden_size=64; set model.hidden_size to 64, or give another checkpoint",
        ),
        ("model.num_layers", 4, "have model.num_layers=2"),
        ("model.num_attention_heads", 2, "have model.num_attention_heads=4"),
        ("model.vocab_size", 1024, "have model.vocab_size=512"),
        ("model.ffn_hidden_size", None, "have model.ffn_hidden_size=128"),
        ("model.activation", "swiglu", "have model.activation='relu2'"),
        ("model.tie_embeddings", True, "have model.tie_embeddings=False"),
        ("low_rank.kind", "none", "have low_rank.kind='lowrank'"),
        ("low_rank.rank", 8, "have low_rank.rank=16"),
    ):
        message = refused({**new, key: value})
        assert message.startswith(f"{key}={value!r}: the weights of checkpoint.init_from={source} {expected}")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for given, expected in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "has no checkpoint"),
        (tmp_path, "holds no checkpoint"),
        (
            f"{source}/checkpoints",
            f"is a folder of checkpoints; the newest one is {source}/checkpoints/step_00000010",
        ),
        (f"{source}/config.json", "is a file"),
        (f"{source}/checkpoints/step_00000010", None),
        (source, None),
    ):
        settings = {**new, "checkpoint.init_from": str(given)}
        if expected:
            assert refused(settings).startswith(f"checkpoint.init_from={str(given)!r}: {expected}")
        else:
            assert find_initial(load_config(None, settings), None).checkpoint.step == 10
    found = find_initial(load_config(None, {**new, "model.rotary_base": 500, "model.seq_length": 64}), None)
    assert found.differs == ("model.rotary_base=500, but the weights were trained with 10000",)

    message = refused({**first, "checkpoint.init_from": source})
    assert f"train.run_dir={source} holds a run that started without it; give another train.run_dir" in message
    both = {**new, "checkpoint.resume": f"{source}/checkpoints/step_00000010"}
    assert "conflicts with checkpoint.resume=" in refused(both)


def test_a_damaged_source_is_found_before_training(first, tmp_path):
    copy = shutil.copytree(f"{first['train.run_dir']}/checkpoints/step_00000010", tmp_path / "step_00000010")
    content = bytearray((copy / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "__0_0.distcp").write_bytes(content)
    settings = {**first, "train.run_dir": str(tmp_path / "run"), "checkpoint.init_from": str(copy)}
    ended, _ = run_ranks(1, initial_run.train, settings, timeout=200)[0]
    assert ended == f"checkpoint.init_from='{copy}': __0_0.distcp is damaged; give another checkpoint"
