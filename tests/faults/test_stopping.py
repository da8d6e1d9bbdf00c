"""Asked to stop, a run saves, says how it ended, and goes on from there as if nothing had been."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpora import SMALL, write_corpus
from support.training_processes import curve, finish, rows, start, wait_for_step

from elas.config import load_config
from elas.extensions import prebuild_deepspeed
from elas.train.signals import StopRequest
from elas.train.standing import Standing, how_to_resume, stopped_line

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
    printed = [line for line in output.splitlines() if line.startswith("stop")]
    assert len(printed) == 2 and printed[0].startswith(f"stopping ({number.name}): the run will "), output
    stopped = f"stopped after step {marker['step']} ({number.name}), saved in {marker['checkpoint']}"
    assert printed[1] == f"{stopped}; the same command resumes from there"
    assert 5 <= marker["step"] < 60 and rows(tmp_path)[-1]["step"] == marker["step"]
    finish(start(settings))
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 60 and not (tmp_path / "REQUEUE").exists()
    assert curve(tmp_path) == curve(whole)


def test_a_run_stopped_before_a_new_step_says_what_is_saved(settings, tmp_path):
    """Its first step, of 64 micro-batches, is left before its update."""
    slow = {"train.micro_batch_size": 1, "train.global_batch_size": 64, "train.run_dir": tmp_path}
    output = finish(start({**settings, **slow, "train.steps": 1}, 1))
    saved, row = tmp_path / "checkpoints" / "step_00000001", rows(tmp_path)[-1]
    perplexity = f"{math.exp(rows(tmp_path, 'validation')[-1]['loss']):,.1f}"
    done = f"done: step 1, 2,048 tokens, loss {row['loss']:.4f}, validation perplexity {perplexity}; {saved}; "
    assert output.splitlines()[-1].startswith(done), output
    (rank,) = start({**settings, **slow, "train.steps": 3}, 1)
    for line in rank.stdout:
        if line.startswith("resumed from"):
            rank.send_signal(signal.SIGTERM)
            break
    output = finish([rank])
    kept = f"nothing is lost: step 1 is saved in {saved}"
    stopping = f"stopping (SIGTERM): the run will end; the same signal again ends it at once, and then {kept}"
    stopped = f"stopped after step 1 (SIGTERM), saved in {saved}; the same command resumes from there"
    assert [line for line in output.splitlines() if line.startswith(("stop", "done"))] == [stopping, stopped], output
    assert json.loads((tmp_path / "REQUEUE").read_text())["checkpoint"] == str(saved)


@pytest.mark.parametrize(
    "checkpoint, unsaved, plan, lost",
    [
        (None, False, "the run will end", "nothing has been trained yet"),
        (None, True, "the run will save and end", "all steps are lost, as none is saved yet"),
        (Path("a/b"), False, "the run will end", "nothing is lost: step 4 is saved in a/b"),
        (Path("a/b"), True, "the run will save and end", "all steps after 4 are lost; a/b is kept"),
    ],
)
def test_what_a_stop_would_lose(checkpoint, unsaved, plan, lost):
    standing = Standing(checkpoint, 4, unsaved)
    assert (standing.plan(), standing.lost()) == (plan, lost)


def test_how_to_resume_depends_on_what_the_run_was_to_resume(tmp_path):
    config = load_config(None, {"train.run_dir": str(tmp_path)})
    own, other = tmp_path / "checkpoints" / "step_00000002", tmp_path / "other" / "step_00000002"
    assert how_to_resume(config, own) == "the same command resumes from there"
    assert how_to_resume(config, other) == "the same command starts from there again"
    config.checkpoint.resume = "none"
    assert how_to_resume(config, own) == "to resume from there, set checkpoint.resume=auto"
    assert stopped_line(config, 0, "SIGINT", None).startswith("stopped before step 1 was done (SIGINT), so nothing was")


def test_a_time_budget(settings, tmp_path):
    finish(start({**settings, "train.run_dir": tmp_path, "train.stop_after_minutes": 0.02, "train.steps": 100000}, 1))
    marker = json.loads((tmp_path / "REQUEUE").read_text())
    assert marker["stopped"] == "train.stop_after_minutes is over" and 1 <= marker["step"] < 100000


WAITING = """
import hashlib
from elas.train.signals import StopRequest
from elas.train.standing import Standing
def say(text):
    print(text, flush=True)
with StopRequest(None, say, lambda: Standing("a/step_00000040", 40, unsaved=True)):
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a look at signals, as in a collective
"""


@pytest.mark.parametrize("launched", [True, False])
def test_the_same_signal_again_ends_it_even_in_a_collective(launched):
    env = {**os.environ, **({"MASTER_ADDR": "127.0.0.1"} if launched else {})}
    start = [sys.executable, "-c", WAITING]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        lost = "all steps after 40 are lost; a/step_00000040 is kept"
        again = f"the run will save and end; the same signal again ends it at once, and then {lost}"
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
