"""A loss that jumps: ignored, the end, or back to the last checkpoint and on with other samples."""

import json

import pytest
import spikes
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks
from support.training_processes import rows

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def settings(tmp_path) -> dict:
    corpus = write_corpus(tmp_path / "corpus" / "text", documents=400)
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": str(tmp_path / "run")}
    return {**settings, "train.steps": 40, "checkpoint.every_steps": 10, "train.timeout_seconds": None}


def manifest(run_dir: str, step: int) -> dict:
    with open(f"{run_dir}/checkpoints/step_{step:08d}/manifest.json") as file:
        return json.load(file)


def test_rollback_goes_on_with_samples_that_were_not_seen(settings, tmp_path):
    results = run_ranks(2, spikes.train, {**settings, "train.on_spike": "rollback"}, (30,))
    for outcome, seen in results:
        assert "RunResult(step=40" in outcome
        assert len(seen) == 50 and len(set(seen)) == 50  # 21 to 30 again as steps, but no batch twice
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert [row.get("rollbacks", 0) for row in metrics] == [0] * 20 + [1] * 20
    assert manifest(settings["train.run_dir"], 40)["consumed_samples"] == 50 * 8
    more = {**settings, "train.steps": 44, "train.on_spike": "rollback"}
    _, seen = run_ranks(2, spikes.train, more, ())[0]
    assert len(seen) == 4 and not set(seen) & set(results[0][1])
    assert manifest(settings["train.run_dir"], 44)["consumed_samples"] == 54 * 8


def test_stop(settings):
    outcome, _ = run_ranks(2, spikes.train, {**settings, "train.on_spike": "stop"}, (30,))[1]
    assert (
        outcome.startswith("FloatingPointError: step 30: loss")
        and "is a spike over" in outcome
        and "step_00000020" in outcome
    )


def test_ignored_by_default(settings):
    outcome, seen = run_ranks(2, spikes.train, settings, (30,))[0]
    assert "RunResult(step=40" in outcome and len(seen) == 40


def test_spikes_without_end_end_the_run(settings):
    settings |= {"train.on_spike": "rollback", "train.max_rollbacks": 1, "train.steps": 60}
    outcome, seen = run_ranks(2, spikes.train, settings, (25, 50))[0]
    assert outcome.startswith("FloatingPointError: step 45") and "step_00000040" in outcome and len(seen) == 50
