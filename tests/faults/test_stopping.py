"""Asked to stop, a run finishes its step, saves, says how it ended, and goes on from there as if nothing had been."""

import json
import signal
import subprocess
import sys
import time

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


WAITING = """
import os, time
from elas.train.signals import StopRequest
with StopRequest(None) as stop:
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_same_signal_again_ends_it_at_once_but_not_one_that_was_handed_on_twice():
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # a scheduler; a launcher beside it
            process.send_signal(number)
            time.sleep(0.3)
        assert process.poll() is None
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
