"""Phases that a run is too short for are said before it starts, and shares of the run fit any length."""

import pytest
from support.corpora import SMALL, arguments, write_corpus

from elas import cli
from elas.config import load_config
from elas.config.phases import SPIKE_WINDOW, unreached

LORO = {"optimizer.kind": "loro", "optimizer.lr": 0.006, "optimizer.exact_every": 20}
QUIET = {
    "train.steps": 50, "sparsity.dense_steps": 10, "schedule.warmup_steps": 5, "train.eval_every": 10,
    "checkpoint.every_steps": 10, "log.every_steps": 5,
}  # fmt: skip


def keys(settings: dict, start: int = 0) -> list[str]:
    lines = unreached(load_config("quickstart", {**QUIET, **settings}), start)
    assert all("\n" not in line and line.count("; ") >= 1 for line in lines)
    return [line.partition("=")[0] for line in lines]


@pytest.mark.parametrize(
    "settings, start, named",
    [
        ({}, 0, []),
        ({"sparsity.dense_steps": 49}, 0, []),
        ({"sparsity.dense_steps": 50}, 0, ["sparsity.dense_steps"]),
        ({"sparsity.dense_steps": 60}, 30, ["sparsity.dense_steps"]),  # resumed
        ({"sparsity.dense_steps": 60, "sparsity.kind": "none"}, 0, []),
        ({"sparsity.dense_steps": 60, "low_rank.kind": "cola", "low_rank.activation": "relu2",
          "model.activation": "swiglu"}, 0, ["sparsity.dense_steps"]),
        ({"schedule.warmup_steps": 51}, 0, ["schedule.warmup_steps"]),
        ({"schedule.warmup_steps": 50}, 0, ["schedule.warmup_steps"]),
        ({"schedule.warmup_steps": 50, "schedule.kind": "constant"}, 0, []),
        ({"schedule.kind": "wsd"}, 0, []),
        ({"schedule.kind": "wsd", "schedule.decay_steps": 46}, 0, ["schedule.decay_steps"]),
        ({"schedule.kind": "wsd", "schedule.warmup_steps": 46}, 0, ["schedule.decay_steps"]),  # a tenth, by default
        (LORO, 0, []),
        ({**LORO, "optimizer.exact_every": 60}, 0, ["optimizer.exact_every"]),
        ({**LORO, "optimizer.exact_every": 50}, 0, ["optimizer.exact_every"]),
        ({**LORO, "optimizer.exact_every": 60, "optimizer.refresh": "only"}, 0, ["optimizer.exact_every"]),
        ({**LORO, "optimizer.exact_every": 30}, 31, ["optimizer.exact_every"]),
        ({"optimizer.exact_every": 60}, 0, []),  # adamw has none
        ({"train.eval_every": 50}, 0, ["train.eval_every"]),
        ({"train.eval_every": 60}, 0, ["train.eval_every"]),
        ({"train.eval_every": 60, "train.eval_batches": 0}, 0, []),  # off on purpose
        ({"train.eval_every": 0}, 0, []),
        ({"checkpoint.every_steps": 100}, 0, ["checkpoint.every_steps"]),
        ({"checkpoint.every_steps": 0}, 0, []),
        ({"checkpoint.every_steps": 30}, 30, ["checkpoint.every_steps"]),
        ({"checkpoint.keep_every": 20}, 0, []),
        ({"checkpoint.keep_every": 25}, 0, []),  # the last step
        ({"checkpoint.keep_every": 60}, 0, ["checkpoint.keep_every"]),
        ({"checkpoint.keep_every": 7}, 0, ["checkpoint.keep_every"]),  # 70 is the first that also saves
        ({"checkpoint.keep_every": 60, "checkpoint.keep": 0}, 0, []),
        ({"log.every_steps": 60}, 0, ["log.every_steps"]),
        ({"train.on_spike": "stop"}, 0, []),
        ({"train.on_spike": "stop"}, 35, ["train.on_spike"]),
        ({"train.on_spike": "rollback", "checkpoint.every_steps": 0}, 0, ["train.on_spike"]),
        ({"sparsity.dense_steps": 60, "schedule.warmup_steps": 60}, 50, []),  # nothing left to do
    ],
)  # fmt: skip
def test_each_phase_that_is_not_reached_is_a_line(settings, start, named):
    assert keys(settings, start) == named


def test_the_spike_window_is_the_training_loops():
    from elas.train import anomalies

    assert SPIKE_WINDOW == anomalies.LEAST


def test_published_presets_reach_all_their_phases():
    from elas.config import presets

    for name in presets():
        assert unreached(load_config(name)) == [], name


@pytest.mark.parametrize("steps, dense, warmup", [(300, 30, 30), (50, 5, 5), (10, 1, 1), (2, 1, 1)])
def test_a_share_becomes_steps_of_the_run(steps, dense, warmup):
    config = load_config("quickstart", {"train.steps": steps})
    assert (config.sparsity.dense_steps, config.schedule.warmup_steps) == (dense, warmup)
    assert "sparsity.dense_steps" not in " ".join(unreached(config))
    shared = load_config(None, {"schedule.decay_steps": 0.5, "train.steps": steps})
    assert shared.schedule.decay_steps == max(1, steps // 2)
    assert load_config(None, {"sparsity.dense_steps": 0}).sparsity.dense_steps == 0


@pytest.mark.parametrize("key", ["train.eval_every", "checkpoint.every_steps", "log.every_steps"])
@pytest.mark.parametrize("start", [0, 20, 45])
def test_what_a_warning_advises_ends_it(key, start):
    """Of a resumed run too, where a number may be less than train.steps and still have no multiple that is left."""
    given = {**QUIET, key: 15 if start == 45 else 60}
    (line,) = [line for line in unreached(load_config("quickstart", given), start) if line.startswith(key)]
    advised = int(line.split("; give ")[1].split()[0 if start else 2].rstrip(","))
    for value in range(1, advised + bool(start)):
        assert not [1 for line in unreached(load_config("quickstart", {**QUIET, key: value}), start) if key in line]


def test_training_says_on_stderr_what_it_will_not_reach(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("elas.parallel.initialize", _refuse)  # far enough
    settings = {**SMALL, "data.train": write_corpus(tmp_path / "text"), "data.split": "90,10,0"}
    settings |= {"train.run_dir": str(tmp_path / "run"), "sparsity.dense_steps": 99, "schedule.warmup_steps": 99}
    with pytest.raises(RuntimeError, match="far enough"):
        cli.run(["train", *arguments(settings)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    steps = SMALL["train.steps"]
    assert lines[0] == (
        f"warning: sparsity.dense_steps=99: 2:4 sparsity never starts, the run ends at train.steps={steps}; "
        f"give less than {steps}, or a share such as 0.1, or more train.steps"
    )
    assert lines[1].startswith("warning: schedule.warmup_steps=99: the warm-up is longer than the run")


def _refuse(*_args, **_kwargs):
    raise RuntimeError("far enough")
