"""torchrun by itself: an agent is killed with its ranks, and the others go on without them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import free_port

from elas.extensions import prebuild_deepspeed
from elas.launch import pretrain

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return {**SMALL, "data.train": corpus, "data.split": "90,10,0"}


def test_torchrun_restarts_with_the_remaining_ranks(settings, tmp_path):
    """Two agents of one rank each; one is killed with its worker, the other goes on alone from its checkpoint."""
    run_dir = tmp_path / "run"
    more = {"train.steps": 120, "checkpoint.every_steps": 5, "train.timeout_seconds": 8, "train.run_dir": run_dir}
    elastic = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_backend", "c10d"]
    elastic += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "elastic", "--local_addr", "127.0.0.1"]
    elastic += ["--rdzv_conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, pretrain.__file__]
    command += arguments({**settings, **more})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(2)  # it serves the rendezvous, and will be the one that stays
    second = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(run_dir.glob("checkpoints/step_*[0-9]")):
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
            time.sleep(0.05)
        workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for pid in (second.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        output = first.communicate(timeout=150)[0]
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert first.returncode == 0, output
    sizes = [line.split("DP ")[1].split(",")[0] for line in output.splitlines() if "DP " in line]
    assert sizes[-1] == "1" and "resumed from" in output
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 121)) and (run_dir / "DONE").exists()
