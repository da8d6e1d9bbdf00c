"""A rank that is killed, stopped or stuck: all others end in time and say which it was."""

import json
import os
import signal
import time

import pytest
import watched
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks
from support.training_processes import start, wait_for_step

from elas.extensions import prebuild_deepspeed

pytestmark = pytest.mark.timeout(300)
TIMEOUT = 6.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.steps": 100000}
    return {**settings, "checkpoint.every_steps": 0, "train.timeout_seconds": TIMEOUT}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_the_others_end_and_name_it(settings, tmp_path, victim, number):
    ranks = start({**settings, "train.run_dir": tmp_path})
    try:
        wait_for_step(tmp_path, 3, ranks)
        time.sleep(TIMEOUT / 10 * 2)  # steps are faster than heartbeats: each rank has sent one
        since = time.monotonic()
        os.kill(ranks[victim].pid, number)
        output = ranks[1 - victim].communicate(timeout=60)[0]
        took = time.monotonic() - since
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1 - victim].returncode == 1
    assert took < 2 * TIMEOUT + 5
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: rank {victim} ") and "step" in line
    assert "Traceback" not in output
    stacks = tmp_path / "stacks" / f"rank_{1 - victim:05d}.txt"
    if victim:  # rank 0 writes the events
        event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
        assert event["event"] == "failed" and event["why"].startswith("rank 1 ") and event["step"] >= 3
    assert "thread" in stacks.read_text().lower() and f"rank {victim} " in stacks.read_text()


def test_one_that_is_stuck_while_the_others_wait(tmp_path):
    results = run_ranks(2, watched.one_stands_still, str(tmp_path), 1.5)
    assert [ended for ended, _ in results] == [[1], [1]]
    assert all(took < 4 for _, took in results)
    for rank in range(2):
        report = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert report.startswith("rank 1 has made no progress for 1.5 s (at step 1, forward and backward)")


def test_a_rank_that_never_comes(settings, tmp_path):
    ranks = start({**settings, "train.run_dir": tmp_path, "train.timeout_seconds": 2.0})
    ranks[1].kill()
    output = ranks[0].communicate(timeout=60)[0]
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "Traceback" not in output
    assert "error: not all 2 ranks connected to 127.0.0.1:" in output and "within 2 s" in output
