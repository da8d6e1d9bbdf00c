"""Which folders count as checkpoints, and which may be resumed."""

import json

import pytest

from elas.checkpoint.local import Checkpoint, find_checkpoint, identity, read_checkpoint
from elas.config import load_config
from elas.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    return load_config(None, {"train.run_dir": str(tmp_path / "run"), "model.hidden_size": 64})


def put(config, step: int, *, world: int = 1, manifest: bool = True, size: int = 4):
    folder = (config.train.run_dir, "checkpoints", f"step_{step:08d}")
    from pathlib import Path

    path = Path(*folder)
    path.mkdir(parents=True)
    (path / "rank_00000.pt").write_bytes(b"x" * size)
    if manifest:
        facts = {"step": step, "identity": identity(config, world), "files": {"rank_00000.pt": {"bytes": 4}}}
        (path / "manifest.json").write_text(json.dumps(facts))
    return path


def test_the_newest_whole_checkpoint_is_found(config):
    assert find_checkpoint(config, 1) is None
    put(config, 3)
    put(config, 6)
    put(config, 9, size=3)  # cut short
    put(config, 12, manifest=False)  # killed before its manifest
    assert find_checkpoint(config, 1).step == 6


def test_a_named_checkpoint_must_be_whole(config):
    broken = put(config, 9, size=3)
    config.checkpoint.resume = str(broken)
    with pytest.raises(ConfigError, match="cut short"):
        find_checkpoint(config, 1)
    config.checkpoint.resume = str(put(config, 12))
    assert isinstance(read_checkpoint(broken), str)
    assert isinstance(find_checkpoint(config, 1), Checkpoint)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.hidden_size", 128),
        ("low_rank.rank", 64),
        ("parallel.tensor", 2),
        ("parallel.zero", 2),
        ("train.seed", 1),
    ],
)
def test_another_model_or_layout_is_refused_by_name(config, key, value):
    put(config, 3)
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(config, 1)
    assert str(caught.value).startswith(f"{key}={value}: the checkpoint")


def test_another_world_size_is_refused(config):
    put(config, 3, world=2)
    with pytest.raises(ConfigError, match="world_size=1"):
        find_checkpoint(config, 1)


def test_settings_that_may_change_may_change(config):
    put(config, 3)
    config.train.steps += 100
    config.log.every_steps = 7
    config.optimizer.lr = 1e-5
    assert find_checkpoint(config, 1).step == 3


def test_a_fresh_start_does_not_overwrite_a_run(config, tmp_path):
    config.checkpoint.resume = "none"
    assert find_checkpoint(config, 1) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        find_checkpoint(config, 1)
