"""Which folders count as checkpoints, and which may be resumed."""

import hashlib
import json
from pathlib import Path

import pytest
from support.corpora import write_corpus

from elas.checkpoint.choose import find_checkpoint
from elas.checkpoint.folder import (
    Checkpoint,
    checkpoints_in,
    newer_than,
    no_checkpoint,
    prune,
    put_in_place,
    read_checkpoint,
)
from elas.checkpoint.identity import identity
from elas.cli import run
from elas.command import exit_status
from elas.config import load_config
from elas.errors import ConfigError
from elas.run_dir import DONE, REQUEUE, claim


@pytest.fixture
def config(tmp_path):
    return load_config(None, {"train.run_dir": str(tmp_path / "run"), "model.hidden_size": 64})


def put(config, step: int, *, manifest: bool = True, size: int = 4) -> Path:
    path = Path(config.train.run_dir, "checkpoints", f"step_{step:08d}")
    partial = path.with_suffix(".partial") if manifest else path
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"x" * size)
    if manifest:
        files = {"__0_0.distcp": {"bytes": 4, "sha256": hashlib.sha256(b"x" * 4).hexdigest()}}
        facts = {"step": step, "tokens": 8 * step, "identity": identity(config), "files": files}
        put_in_place(partial, path, facts)
    return path


def test_the_newest_whole_checkpoint_is_found(config):
    assert find_checkpoint(config) is None
    put(config, 3)
    put(config, 6)
    put(config, 9, size=3)  # truncated
    put(config, 12, manifest=False)  # killed before its manifest
    assert find_checkpoint(config).step == 6


def test_a_named_checkpoint_must_be_whole(config):
    broken = put(config, 9, size=3)
    config.checkpoint.resume = str(broken)
    with pytest.raises(ConfigError, match="truncated"):
        find_checkpoint(config)
    config.checkpoint.resume = str(put(config, 12))
    assert isinstance(read_checkpoint(broken), str)
    assert isinstance(find_checkpoint(config), Checkpoint)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.hidden_size", 128),
        ("low_rank.rank", 64),
        ("optimizer.kind", "loro"),
        ("train.seed", 1),
    ],
)
def test_another_model_is_refused_by_name(config, key, value):
    put(config, 3)
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(config)
    assert str(caught.value).startswith(f"{key}={value!r}: the checkpoint")


def test_settings_that_may_change_may_change(config):
    put(config, 3)
    config.train.steps += 100
    config.log.every_steps = 7
    config.optimizer.lr = 1e-5
    config.parallel.tensor, config.parallel.zero = 2, 3
    assert find_checkpoint(config).step == 3


def test_a_fresh_start_does_not_overwrite_a_run(config, tmp_path):
    config.checkpoint.resume = "none"
    assert find_checkpoint(config) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        find_checkpoint(config)


def test_runs_whose_checkpoints_are_all_broken_do_not_start_over(config):
    put(config, 3, size=3)
    put(config, 6, manifest=False)
    with pytest.raises(ConfigError, match="none of its checkpoints is intact"):
        find_checkpoint(config)


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(config, tmp_path):
    config.checkpoint.every_steps, config.train.steps = 5, 20
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 4}\n{"step": 5}\n')  # killed before its first save
    assert find_checkpoint(config) is None
    (metrics.parent / REQUEUE).write_text('{"step": 5, "checkpoint": null}')  # stopped before it
    assert find_checkpoint(config) is None
    for name in (REQUEUE, DONE):
        (metrics.parent / name).write_text('{"step": 5, "checkpoint": "run/checkpoints/step_00000005"}')
        with pytest.raises(ConfigError, match="go to step 5, but its checkpoints are gone"):
            find_checkpoint(config)
        (metrics.parent / name).unlink()
    metrics.write_text('{"step": 4}\n{"step": 11}\n')
    with pytest.raises(ConfigError, match="go to step 11, but its checkpoints are gone"):
        find_checkpoint(config)


def test_a_run_that_has_yet_to_save_is_not_called_lost(config, tmp_path):
    config.checkpoint.every_steps, config.train.steps = 5, 20
    lock = claim(config)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 11}\n')
    with pytest.raises(ConfigError, match="another run is writing there"):
        find_checkpoint(config)
    lock.release()
    with pytest.raises(ConfigError, match="checkpoints are gone"):
        find_checkpoint(config)


@pytest.mark.parametrize(
    "manifest", ("[]", "{}", "null", '"x"', "{", '{"step": 9, "tokens": 1, "files": 3}', '{"step": "9", "files": {}}')
)
def test_a_manifest_of_another_kind_does_not_count_and_is_told(config, manifest):
    put(config, 3)
    (put(config, 9) / "manifest.json").write_text(manifest)
    found = find_checkpoint(config)
    assert found.step == 3 and len(found.passed_over) == 1 and "step_00000009" in found.passed_over[0]


def test_fewer_steps_than_taken_are_refused(config):
    put(config, 30)
    config.train.steps = 20
    with pytest.raises(ConfigError, match=r"train\.steps=20: the run is already at step 30"):
        find_checkpoint(config)


def test_corpora_are_known_by_what_they_hold(config, tmp_path):
    config.data.train = write_corpus(tmp_path / "a" / "text")
    put(config, 3)
    config.data.train = write_corpus(tmp_path / "moved" / "text")
    assert find_checkpoint(config).step == 3
    for change in ({"documents": 41}, {"seed": 1}):
        config.data.train = write_corpus(tmp_path / "other", **change)
        with pytest.raises(ConfigError, match=r"data\.train="):
            find_checkpoint(config)


def test_one_run_at_a_time_writes_in_a_folder(config, tmp_path):
    from elas.run_dir import claim

    lock = claim(config)
    with pytest.raises(ConfigError, match="another run is writing there"):
        claim(config)
    lock.release()
    claim(config).release()


def test_a_finished_run_has_its_last_checkpoint_and_validation(config, tmp_path):
    from elas.train.result import finished

    config.train.steps = 6
    put(config, 6)
    found = find_checkpoint(config)
    assert finished(config, None) is None and finished(config, found) is None
    (tmp_path / "run" / "validation.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step": 6, "loss": 2.5}\n')
    assert finished(config, found).valid_loss == 2.5
    config.train.eval_batches = 0
    assert finished(config, found) is not None


def test_retention_counts_whole_ones_and_keeps_multiples(config):
    folder = put(config, 10).parent
    for step in (15, 20, 25):
        put(config, step)
    put(config, 30, size=3)  # truncated: kept, and not counted
    prune(folder / "step_00000025", keep=1, keep_every=10)
    assert sorted(path.name[-2:] for path in checkpoints_in(folder)) == ["10", "20", "25", "30"]
    assert find_checkpoint(config).step == 25
    prune(folder / "step_00000025", keep=0, keep_every=0)
    assert len(list(checkpoints_in(folder))) == 4


def test_damaged_checkpoints_push_no_intact_one_out(config):
    """A resume passed steps 40 and 44 over, whose manifests are fine and bytes are not; 31 is what it went on from."""
    folder = put(config, 31).parent
    for step in (40, 44):
        put(config, step)
    damaged = newer_than(folder, 31)
    prune(put(config, 33), 1, 0, damaged)  # older than both: the one just written stays
    assert [path.name[-2:] for path in checkpoints_in(folder)] == ["44", "40", "33"]
    prune(put(config, 48), 2, 0, damaged)
    assert [path.name[-2:] for path in checkpoints_in(folder)] == ["48", "44", "40", "33"]


def test_copies_under_other_names_and_links_do_not_count(config):
    import shutil

    folder = put(config, 5).parent
    put(config, 7)
    shutil.copytree(folder / "step_00000005", folder / "step_00000009")
    shutil.copytree(folder / "step_00000005", folder / "step_60")
    (folder / "step_00000011").symlink_to("step_00000005")
    found = find_checkpoint(config)
    assert found.step == 7 and len(found.passed_over) == 1 and "holds step 5" in found.passed_over[0]
    prune(folder / "step_00000007", keep=1, keep_every=0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000007", "step_00000009", "step_00000011", "step_60"
    ]  # fmt: skip


def test_a_path_that_is_no_checkpoint_is_called_what_it_is(tmp_path):
    folder, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000012"
    newest.mkdir(parents=True)
    (newest.parent / "step_00000003").mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert no_checkpoint(tmp_path / "nowhere") == "no such folder"
    assert no_checkpoint(folder / "metrics.jsonl") == "is a file, not a checkpoint's folder"
    assert no_checkpoint(folder) == f"is a run's folder, not a checkpoint; its newest one is {newest}"
    assert no_checkpoint(newest.parent) == f"is a folder of checkpoints; the newest one is {newest}"
    assert no_checkpoint(tmp_path).startswith("holds no checkpoint") and no_checkpoint(newest) == ""


def test_the_list_is_oldest_first_with_whole_paths(tmp_path, capsys):
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (100, 20, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
    assert exit_status(run, ["checkpoint", "list", str(tmp_path / "run"), "--json", f"{tmp_path}/facts.json"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == [str(folder) for folder in reversed(folders)]
    rows = json.loads((tmp_path / "facts.json").read_text())["checkpoints"]
    assert [row["path"] for row in rows] == [str(folder) for folder in reversed(folders)]
