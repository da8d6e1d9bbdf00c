"""Asked to stop, a run saves, says how it ended, and goes on from there as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from corpora import SMALL, write_corpus
from training_processes import curve, finish, rows, start, wait_for_step

from elas.extensions import prebuild_deepspeed
from elas.train.signals import StopRequest

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


@pytest.mark.parametrize("number, save_beside", [(signal.SIGINT, False), (signal.SIGUSR1, True)])
def test_a_signal_to_one_rank_stops_all_after_a_save(settings, whole, tmp_path, number, save_beside):
    settings = {**settings, "train.run_dir": tmp_path, "checkpoint.async_save": save_beside}
    settings["checkpoint.every_steps"] = 7 if save_beside else 0
    ranks = start(settings)
    wait_for_step(tmp_path, 5, ranks)
    ranks[1].send_signal(number)
    output = finish(ranks)
    marker = json.loads((tmp_path / "REQUEUE").read_text())
    assert marker["stopped"] == number.name and not (tmp_path / "DONE").exists()
    told = [line for line in output.splitlines() if line.startswith("stop")]
    assert len(told) == 2 and told[0].startswith(f"stopping ({number.name}): the run will save and end; "), output
    assert told[1] == f"stopped after step {marker['step']} ({number.name}); the same command goes on from there"
    assert 5 <= marker["step"] < 60 and rows(tmp_path)[-1]["step"] == marker["step"]
    finish(start(settings))
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 60 and not (tmp_path / "REQUEUE").exists()
    assert curve(tmp_path) == curve(whole)


def test_a_time_budget(settings, tmp_path):
    finish(start({**settings, "train.run_dir": tmp_path, "train.stop_after_minutes": 0.02, "train.steps": 100000}, 1))
    marker = json.loads((tmp_path / "REQUEUE").read_text())
    assert marker["stopped"] == "train.stop_after_minutes is over" and 1 <= marker["step"] < 100000


WAITING = """
import hashlib
from elas.train.signals import StopRequest
def say(text):
    print(text, flush=True)
with StopRequest(None, say) as stop:
    stop.lost = lambda: "what came after step 40 is lost"
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a look at signals, as in a collective
"""


@pytest.mark.parametrize("launched", [True, False])
def test_the_same_signal_again_ends_it_at_once_even_in_a_collective(launched):
    env = {**os.environ, **({"MASTER_ADDR": "127.0.0.1"} if launched else {})}
    start = [sys.executable, "-c", WAITING]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        lost = "what came after step 40 is lost"
        again = f"the run will save and end; the same signal again ends it at once ({lost})"
        assert process.stdout.readline() == f"stopping (SIGUSR1): {again}\n"
        process.send_signal(signal.SIGTERM)  # as schedulers do: it changes nothing
        time.sleep(0.5)
        if launched:  # the terminal and the launcher both hand it on
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
            time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert process.stdout.read() == ""
        assert process.stderr.read().strip() == f"error: ended at once by the second SIGTERM; {lost}"
    finally:
        process.kill()
        process.communicate()


def test_a_hangup_that_is_ignored_stays_so_and_else_asks_to_stop():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with StopRequest(None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        heard = []
        with StopRequest(None, heard.append) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + 10
            while not heard and time.monotonic() < deadline:
                time.sleep(0.01)
        assert stop.signalled and heard[0].startswith("stopping (SIGHUP): ")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
