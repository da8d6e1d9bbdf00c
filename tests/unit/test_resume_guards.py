"""Resuming refuses what would train another model or on other samples, lets all else through, and says what changed."""

import hashlib
import json
import time
from pathlib import Path

import pytest
from support.corpora import SMALL, write_corpus

from elas.checkpoint.choose import find_checkpoint
from elas.checkpoint.folder import put_in_place
from elas.checkpoint.identity import identity
from elas.config import load_config
from elas.errors import ConfigError
from elas.launch.dry_run import dry_run
from elas.train import history


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {name: write_corpus(folder / name, seed=seed) for seed, name in enumerate("abc")}


def config_of(tmp_path, settings: dict):
    return load_config(None, {**SMALL, "train.run_dir": str(tmp_path / "run"), **settings})


def put(config, step: int = 3, **facts) -> Path:
    """A checkpoint of a run with these settings, without tensors."""
    path = Path(config.train.run_dir, "checkpoints", f"step_{step:08d}")
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True)
    (partial / "x").write_bytes(b"x")
    files = {"x": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    manifest = {"step": step, "tokens": 8 * step, "identity": identity(config), "config": config.to_dict()}
    manifest |= {"shares": dict(config.shares)}
    put_in_place(partial, path, {**manifest, "files": files, **facts})
    return path


def refused(tmp_path, settings: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(config_of(tmp_path, settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


BLEND = ["0.7", "a", "0.3", "b"]
HARMLESS = {
    "validation corpus": ({"data.train": "a", "data.valid": "b"}, {"data.train": "a", "data.valid": "c"}),
    "split beside a validation corpus": ({"data.valid": "b"}, {"data.valid": "b", "data.split": "50,25,25"}),
    "validation of a run that held nothing out": (
        {"data.split": "100,0,0", "train.eval_batches": 0},
        {"data.split": "100,0,0", "data.valid": "b"},
    ),
    "initialisation": ({}, {"model.init_std": 0.5}),
    "longest sequence": ({}, {"model.max_position_embeddings": 4096}),
    "width by its default": ({"model.ffn_hidden_size": None}, {"model.ffn_hidden_size": 256}),
    "groups by their default": ({}, {"model.num_query_groups": 4}),
    "rank of a full-rank model": (
        {"low_rank.kind": "none"},
        {"low_rank.kind": "none", "low_rank.rank": 8, "low_rank.activation": "relu2"},
    ),
    "scale of magnitude": ({}, {"sparsity.scale": 3.0}),
    "the same shares": ({"data.split": "90,10,0"}, {"data.split": "0.9,0.1"}),
    "validation and test share": ({"data.split": "90,10,0"}, {"data.split": "90,5,5"}),
    "weights of the same ratio": ({"data.train": BLEND}, {"data.train": ["7", "a", "3", "b"]}),
    "weight of a single corpus": ({"data.train": "a"}, {"data.train": ["2", "a"]}),
    "schedule and steps": ({}, {"optimizer.lr": 1.0, "schedule.kind": "wsd", "train.steps": 99}),
}  # fmt: skip

DECISIVE = {
    "a validation corpus added": (
        {"data.split": "90,10,0"}, {"data.valid": "b", "data.split": "90,10,0"},
        "data.valid='{b}': the checkpoint {path} was written with data.valid=None, so data.split='90,10,0' "
        "held out documents of data.train; resume with the same setting, or start in another",
    ),
    "a validation corpus dropped": (
        {"data.valid": "b", "data.split": "90,10,0"}, {"data.split": "90,10,0"},
        "data.valid=None: the checkpoint {path} was written with data.valid='{b}', so data.split='90,10,0' did not",
    ),
    "split": (
        {"data.split": "90,10,0"}, {"data.split": "80,20,0"},
        "data.split='80,20,0': the checkpoint {path} was written with data.split='90,10,0'",
    ),
    "corpus": ({}, {"data.train": "b"}, "with data.train='{a}', which held other tokens in 40 documents of"),
    "blend weights": (
        {"data.train": BLEND}, {"data.train": ["0.6", "a", "0.4", "b"]},
        "was written with data.train=['0.7', '{a}', '0.3', '{b}']; resume with the same setting",
    ),
    "blend order": ({"data.train": BLEND}, {"data.train": ["0.3", "b", "0.7", "a"]}, "data.train=['0.3', '{b}'"),
    "sources": ({"data.train": ["a", "b"]}, {"data.train": ["a", "b", "c"]}, "now 120 documents of"),
    "packing": ({}, {"data.packing": "document"}, "was written with data.packing='packed'"),
    "batch": ({}, {"train.global_batch_size": 16}, "train.global_batch_size=16: the checkpoint {path} was"),
    "length": ({}, {"model.seq_length": 16}, "model.seq_length=16: the checkpoint {path} was written with"),
    "width": (
        {"model.ffn_hidden_size": None}, {"model.ffn_hidden_size": 512},
        "model.ffn_hidden_size=512: the checkpoint {path} was written with model.ffn_hidden_size=None",
    ),
    "norm": ({}, {"model.norm_eps": 1e-5}, "was written with model.norm_eps=1e-06"),
    "pruning": ({}, {"sparsity.method": "soft_threshold"}, "was written with sparsity.method='magnitude'"),
    "between cola's factors": (
        {"low_rank.kind": "cola"}, {"low_rank.kind": "cola", "low_rank.activation": "relu2"},
        "low_rank.activation='silu'",
    ),
}  # fmt: skip


def with_paths(settings: dict, corpora: dict) -> dict:
    settings = {"data.train": "a", **settings}
    for key in {"data.train", "data.valid"} & settings.keys():
        value = settings[key]
        settings[key] = [corpora.get(v, v) for v in value] if isinstance(value, list) else corpora[value]
    return settings


@pytest.mark.parametrize("name", HARMLESS)
def test_what_decides_nothing_may_change(tmp_path, corpora, name):
    before, after = (with_paths(settings, corpora) for settings in HARMLESS[name])
    put(config_of(tmp_path, before))
    assert find_checkpoint(config_of(tmp_path, after)).step == 3


@pytest.mark.parametrize("name", DECISIVE)
def test_what_decides_model_or_order_is_refused_as_typed(tmp_path, corpora, name):
    before, after, expected = DECISIVE[name]
    path = put(config_of(tmp_path, with_paths(before, corpora)))
    assert expected.format(path=path, **corpora) in refused(tmp_path, with_paths(after, corpora))


def test_a_corpus_tokenised_again_is_refused(tmp_path, corpora):
    settings = {"data.train": write_corpus(tmp_path / "text")}
    put(config_of(tmp_path, settings))
    write_corpus(tmp_path / "text", documents=41)
    message = refused(tmp_path, settings)
    assert "which held 40 documents of 8,000 tokens, now 41 documents of 8,200 tokens" in message
    assert message.endswith("resume with the same corpus, or start in another train.run_dir")


def older(config) -> dict:
    """The identity of a checkpoint from before held-out documents were spread."""
    values = config.to_dict()
    flat = {f"{section}.{key}": value for section in ("model", "low_rank") for key, value in values[section].items()}
    flat |= {"data.split": config.data.split, "data.train": identity(config)["data.train"], "train.seed": 1234}
    return flat | ({"data.valid": [[None, 1, 1, "x"]]} if config.data.valid else {})


def test_older_checkpoints_resume_unless_they_held_out_the_tail(tmp_path, corpora):
    for folder, settings in (("valid", {"data.valid": "b"}), ("all", {"data.split": "1,0,0"}), ("tail", {})):
        config = config_of(tmp_path / folder, with_paths({"data.split": "90,10,0", **settings}, corpora))
        path = put(config, identity=older(config))
        if folder != "tail":
            assert find_checkpoint(config).step == 3
            continue
        with pytest.raises(ConfigError) as caught:
            find_checkpoint(config)
        assert str(caught.value) == (
            f"data.split='90,10,0': the version that wrote {path} held out the last documents, this one spreads them "
            f"over the corpus; start in another train.run_dir, with checkpoint.init_from={path} to keep its weights"
        )


def test_changes_are_said_and_kept_from_the_step_they_hold(tmp_path, corpora):
    def start(step: int | None, **settings) -> list[str]:
        config = config_of(tmp_path, {"data.train": corpora["a"], **settings})
        config.checkpoint.resume = str(tmp_path / f"run/checkpoints/step_{step:08d}") if step else "auto"
        return history.record(config, find_checkpoint(config))

    path = tmp_path / "run" / history.NAME
    assert start(None) == [] and not path.exists()
    put(config_of(tmp_path, {"data.train": corpora["a"]}), 3)
    assert start(3) == [] and not path.exists()
    lines = start(3, **{"optimizer.lr": 1e-4, "train.steps": 20})
    assert lines == [
        "changed from step 4 on: optimizer.lr=0.0001 (was 0.003)",
        "changed from step 4 on: train.steps=20 (was 10)",
    ]
    put(config_of(tmp_path, {"data.train": corpora["a"], "optimizer.lr": 1e-4, "train.steps": 20}), 6)
    more = {"optimizer.lr": 1e-4, "train.steps": 20, "sparsity.gradient": "ste"}
    assert start(6, **more) == ["changed from step 7 on: sparsity.gradient='ste' (was 'masked')"]
    assert start(6, **more) == ["changed from step 7 on: sparsity.gradient='ste' (was 'masked')"]  # killed, once more
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["changed"]) for row in rows] == [
        (3, {"optimizer.lr": [0.003, 0.0001], "train.steps": [10, 20]}),
        (6, {"sparsity.gradient": ["masked", "ste"]}),
    ]
    assert all(isinstance(row["time"], float) and abs(row["time"] - time.time()) < 600 for row in rows)
    assert start(6, **{"optimizer.lr": 1e-4, "train.steps": 20}) == []  # not changed after all
    assert len(path.read_text().splitlines()) == 1
    assert start(3) == [] and path.read_text() == ""


def test_a_dry_run_says_what_would_change(tmp_path, corpora, capsys):
    """Before the start that would change it; that start's history is not written."""
    data = {"data.train": corpora["a"], "data.split": "90,10,0", "parallel.zero": 0}
    put(config_of(tmp_path, data), 3)
    same, other = data, data | {"optimizer.lr": 1e-4, "train.steps": 20}
    for settings, expected in ((same, {}), (other, {"optimizer.lr": [0.003, 1e-4], "train.steps": [10, 20]})):
        config = config_of(tmp_path, settings)
        assert dry_run(config, 1, tmp_path / "facts.json", shows=True) == 0
        out = capsys.readouterr().out
        assert out.count("changed from step 4 on: ") == len(expected)
        assert json.loads((tmp_path / "facts.json").read_text())["changed"] == expected
    assert "optimizer.lr=0.0001 (was 0.003)" in out
    assert not (tmp_path / "run" / history.NAME).exists()


def test_a_share_that_changed_is_named_as_it_was_given(corpora, tmp_path):
    before = {"data.train": corpora["a"], "sparsity.dense_steps": 0.2, "schedule.warmup_steps": 2}
    put(config_of(tmp_path, before), 3)

    def changes(**settings) -> dict:
        config = config_of(tmp_path, before | {key.replace("__", "."): value for key, value in settings.items()})
        lines, found = (
            history.record(config, (checkpoint := find_checkpoint(config))),
            history.changes(config, checkpoint),
        )
        for key, (old, new) in found.items():
            assert f"changed from step 4 on: {key}={new} (was {old})" in lines
        return found

    assert changes() == {}
    given = ["0.2 (2 steps)", "0.5 (5 steps)"]
    assert changes(sparsity__dense_steps=0.5) == {"sparsity.dense_steps": given}
    assert changes(sparsity__dense_steps=1) == {"sparsity.dense_steps": ["0.2 (2 steps)", 1]}
    assert changes(schedule__warmup_steps=0.1) == {"schedule.warmup_steps": [2, "0.1 (1 step)"]}
    longer = {"train.steps": [10, 20], "sparsity.dense_steps": ["0.2 (2 steps)", "0.2 (4 steps)"]}
    assert changes(train__steps=20) == longer
