"""The files of a run hold every step once, also after a kill."""

import json

from elas.config import load_config
from elas.files import read_jsonl
from elas.train.metrics import Metrics
from elas.train.trackers import Trackers, open_trackers


def test_lines_past_the_checkpoint_are_dropped_and_the_rest_kept(tmp_path):
    metrics = Metrics(str(tmp_path), Trackers(), last_step=0, writes=True)
    for step in range(1, 6):
        metrics.log("metrics", {"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    Metrics(str(tmp_path), Trackers(), last_step=3, writes=True).log("metrics", {"step": 4, "loss": -4.0})
    assert [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, -4.0]


def test_the_configuration_of_the_run_is_kept(tmp_path):
    config = load_config("60m")
    Metrics(str(tmp_path), Trackers(), last_step=0, writes=True).facts(config.to_dict(), {"first_step": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()


def test_tensorboard_gets_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(None, {"train.run_dir": str(tmp_path)})
    with Metrics(str(tmp_path), open_trackers(config, 0, print), last_step=0, writes=True) as metrics:
        metrics.log("metrics", {"step": 1, "loss": 2.5, "layers": {"sparsity": [None, 0.25]}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/loss")] == [(1, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("layers/sparsity/01")] == [(1, 0.25)]
    assert "layers/sparsity/00" not in events.Tags()["scalars"]


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(str(tmp_path / "run"), Trackers(), last_step=0, writes=False) as metrics:
        metrics.log("metrics", {"step": 1})
    assert not (tmp_path / "run").exists()


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\ngarbage\n{"step": null}\n{"step": 2}\n')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    path.write_text('{"step": 3, "loss": NaN}\n{"step": 4, "n": 123456789012345678901234567890}\n')
    assert [row["step"] for row in read_jsonl(path)] == [3, 4]
    path.write_bytes(b'{"step": 5, "text": "\xff"}\n{"step": 6}\n')
    assert read_jsonl(path)[-1]["step"] == 6
