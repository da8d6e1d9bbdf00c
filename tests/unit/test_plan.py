"""What a run will be is known before it starts: parameters, tokens, memory, schedule; and nothing is written for it."""

import json
from pathlib import Path

import pytest
from support.corpora import SMALL, arguments, write_corpus

from elas import cli
from elas.bench.step_models import Shape, variant_config
from elas.command import exit_status
from elas.config import load_config, presets
from elas.plan.counts import parameter_count, rank_parameters
from elas.plan.memory import estimate
from elas.plan.run import schedule_steps

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"parameters", "tokens", "epochs", "valid_tokens", "memory_bytes"}


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path / "text")


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """Run `elas train --dry-run`: its facts, or its error; a process group would fail the test."""
    import torch.distributed

    def refuse(*_args, **_kwargs):
        raise AssertionError("a process group was made")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(settings: dict, *options: str):
        target = tmp_path / "facts.json"
        target.unlink(missing_ok=True)
        before = sorted(tmp_path.rglob("*"))
        given = {**SMALL, "data.split": "90,10,0", "train.run_dir": str(tmp_path / "run"), **settings}
        status = exit_status(cli.run, ["train", *arguments(given), "--dry-run", *options, "--json", str(target)])
        out, error = capsys.readouterr()
        assert sorted(set(tmp_path.rglob("*")) - {target}) == before
        if status:
            assert status == 2 and error.count("\n") == 1 and not target.exists()
            return error
        return json.loads(target.read_text()), out, error

    return call


def test_a_dry_run_counts_and_writes_nothing(dry, corpus):
    facts, out, _ = dry({"data.train": corpus})
    config = load_config(None, SMALL)
    assert facts.keys() >= REQUIRED
    assert facts["tokens"] == config.train.steps * config.train.global_batch_size * config.model.seq_length
    assert facts["epochs"] == pytest.approx(facts["tokens"] / facts["corpus_tokens"])
    assert f"{facts['parameters']:,}" in out and "memory per rank" in out
    assert facts["memory_bytes"] == sum(facts["memory"].values())
    assert facts["schedule"]["saves"][-1] == config.train.steps


def test_extents_are_those_of_the_samples_that_training_draws(corpus, tmp_path, one_rank):
    from elas.data.batches import build_datasets
    from elas.data.extent import extent

    other = write_corpus(tmp_path / "other", documents=40)
    for settings in (
        {},
        {"data.packing": "document"},
        {"data.valid": other},
        {"data.train": ["0.3", corpus, "0.7", other]},
        {"train.eval_batches": 1000},
        {"train.eval_batches": 0},
    ):
        values = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": str(tmp_path / "run")}
        config = load_config(None, {**values, **settings})
        counted, drawn = extent(config), build_datasets(config)
        assert len(drawn.train) == counted.train_samples
        assert abs((len(drawn.valid) if drawn.valid is not None else 0) - counted.valid_samples) <= len(counted.valid)
        if len(counted.train) == 1:
            assert drawn.train.dataset.__len__() == counted.train[0].samples
        if settings.get("data.packing") == "document":
            real = sum(int((drawn.valid[i]["labels"] >= 0).sum()) for i in range(len(drawn.valid)))
            assert counted.valid_tokens == pytest.approx(real, rel=0.02)


def test_bad_settings_are_refused_as_a_start_would(dry, corpus, tmp_path):
    for settings, options, why in (
        ({"data.train": "nowhere"}, (), "there is no nowhere.idx"),
        ({"data.train": None}, (), "data.train=None"),
        ({"data.train": corpus, "parallel.tensor": 2}, (), "does not divide the world size 1"),
        ({"data.train": corpus}, ("--ranks", "3"), "train.global_batch_size"),
        ({"data.train": corpus}, ("--ranks", "0"), "--ranks 0: out of range"),
        ({"data.train": corpus, "sparsity.implementation": "tritn"}, (), "sparsity.implementation='tritn'"),
        ({"data.train": corpus, "checkpoint.resume": "nowhere"}, (), "checkpoint.resume='nowhere'"),
        ({"data.train": corpus, "checkpoint.init_from": "nowhere"}, (), "checkpoint.init_from='nowhere'"),
        ({"data.train": corpus, "model.vocab_size": 256}, (), "model.vocab_size=256"),
        ({"data.train": corpus, "data.cache": "/proc/elas"}, (), "data.cache='/proc/elas'"),
        (
            {"data.train": corpus, "train.run_dir": "/proc/a/run"},
            (),
            "train.run_dir='/proc/a/run': cannot be written to",
        ),
    ):
        assert why in dry(settings, *options)


def test_a_dry_run_takes_ranks_from_the_launcher_or_the_option(dry, corpus, tmp_path, monkeypatch):
    settings = {"data.train": corpus, "data.cache": str(tmp_path / "new" / "cache")}
    alone, _, _ = dry(settings)
    assert (alone["world_size"], alone["layout"]["zero"]) == (1, 0)
    two, _, _ = dry({**settings, "parallel.tensor": 2}, "--ranks", "4")
    assert two["layout"] == {"tp": 2, "pp": 1, "dp": 2, "zero": 1} and two["parameters"] == alone["parameters"]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    under, _, _ = dry(settings)
    assert under["world_size"] == 2
    assert "the launcher started 2 ranks" in dry(settings, "--ranks", "4")


def test_ranks_without_dry_run_are_refused(capsys):
    assert exit_status(cli.run, ["train", "--config", "60m", "--ranks", "2"]) == 2
    assert "only with --dry-run" in capsys.readouterr().err


def test_a_dry_run_warns_of_phases_that_are_not_reached(dry, corpus):
    facts, out, error = dry({"data.train": corpus, "sparsity.dense_steps": 99})
    assert facts["schedule"]["sparse"] is None and "2:4" in out
    assert facts["warnings"][0] in error and "2:4 sparsity never starts" in error


def test_schedules_say_when_each_phase_is():
    config = load_config("60m-loro", {"train.steps": 2000, "sparsity.dense_steps": 0.25})
    assert schedule_steps(config, 0) == {
        "warmup": [1, 1000], "decay": [1001, 2000], "dense": [1, 500], "sparse": [501, 2000],
        "exact_steps": [500, 1000, 1500, 2000], "refreshes": [500, 1000, 1500, 2000],
        "validations": [0, 500, 1000, 1500, 2000], "saves": [1000, 2000],
    }  # fmt: skip
    assert schedule_steps(config, 1200)["validations"] == [1500, 2000]
    wsd = load_config("60m", {"schedule.kind": "wsd", "schedule.decay_steps": 0.2, "train.steps": 5000})
    assert schedule_steps(wsd, 0)["decay"] == [4001, 5000]


def test_parameters_are_divided_as_the_layout_says():
    for name in presets():
        config = load_config(name)
        whole = parameter_count(config)
        assert rank_parameters(config) == whole
        half = rank_parameters(load_config(name, {"parallel.tensor": 2}))
        assert whole / 2 < half < 0.8 * whole  # replicated factors and norms are on both
        assert rank_parameters(load_config(name, {"parallel.pipeline": 2})) < whole


def test_estimates_fall_where_memory_is_divided():
    def total(ranks: int, **settings):
        config = load_config("1b", {key.replace("__", "."): value for key, value in settings.items()})
        return estimate(config, ranks)

    plain, sharded = total(8, parallel__zero=0), total(8, parallel__zero=1)
    assert sharded.optimizer * 8 == pytest.approx(plain.optimizer, rel=1e-6)
    assert total(8, parallel__zero=3).weights * 8 == pytest.approx(plain.weights, rel=1e-6)
    assert total(8, parallel__tensor=8).activations < total(8).activations
    fused, eager = total(1), total(1, sparsity__ffn_memory="eager")
    assert fused.activations < total(1, sparsity__ffn_memory="compressed").activations < eager.activations


@pytest.mark.parametrize("name", ["step_4x256_float32", "step_4x256_bfloat16"])
def test_the_estimate_of_what_layers_save_is_the_measured_one(name):
    """docs/memory.md: bytes that eight layers of 350m save on 4 × 256 tokens, of every variant of ours."""
    facts = json.loads((ROOT / "docs" / "experiments" / "results" / f"{name}.json").read_text())
    shape = Shape(*(facts[key] for key in ("preset", "layers", "batch", "seq", "zero")))
    rows = [row for row in facts["rows"] if not row["variant"].startswith("hf_llama")]
    assert len(rows) >= 5
    for row in rows:
        expected = estimate(variant_config(row["variant"], shape, row["dtype"]), 1).activations
        assert expected == pytest.approx(row["saved_bytes"], rel=0.01), row["variant"]
