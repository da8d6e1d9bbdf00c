"""Asked to stop, a run finishes its step, saves, says how it ended, and goes on from there as if nothing had been."""

import json
import signal

import pytest
from corpora import SMALL, write_corpus
from training_processes import curve, finish, rows, start, wait_for_step

from elas.extensions import prebuild_deepspeed

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.steps": 60}
    return {**settings, "checkpoint.every_steps": 0, "parallel.zero": 1}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(start({**settings, "train.run_dir": folder}))
    return folder


@pytest.mark.parametrize("number, save_beside", [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_to_one_rank_stops_all_after_a_save(settings, whole, tmp_path, number, save_beside):
    settings = {**settings, "train.run_dir": tmp_path, "checkpoint.async_save": save_beside}
    settings["checkpoint.every_steps"] = 7 if save_beside else 0
    ranks = start(settings)
    wait_for_step(tmp_path, 5, ranks)
    ranks[1].send_signal(number)
    output = finish(ranks)
    marker = json.loads((tmp_path / "REQUEUE").read_text())
    assert marker["stopped"] == number.name and not (tmp_path / "DONE").exists()
    assert f"({number.name}); the same command goes on from there" in output
    assert 5 <= marker["step"] < 60 and rows(tmp_path)[-1]["step"] == marker["step"]
    finish(start(settings))
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 60 and not (tmp_path / "REQUEUE").exists()
    assert curve(tmp_path) == curve(whole)


def test_a_time_budget(settings, tmp_path):
    finish(start({**settings, "train.run_dir": tmp_path, "train.stop_after_minutes": 0.02, "train.steps": 100000}, 1))
    marker = json.loads((tmp_path / "REQUEUE").read_text())
    assert marker["stopped"] == "train.stop_after_minutes is over" and 1 <= marker["step"] < 100000


def test_a_second_signal_ends_it_at_once(settings, tmp_path):
    (rank,) = start({**settings, "train.run_dir": tmp_path, "train.steps": 100000, "model.seq_length": 256}, 1)
    wait_for_step(tmp_path, 1, [rank])
    rank.send_signal(signal.SIGSTOP)  # so that both signals are there before the next step
    rank.send_signal(signal.SIGUSR1)
    rank.send_signal(signal.SIGTERM)
    rank.send_signal(signal.SIGCONT)
    rank.communicate(timeout=60)
    assert rank.returncode in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert not (tmp_path / "REQUEUE").exists() and not list(tmp_path.glob("checkpoints/step_*"))
