"""Kill −9 and start again: the curve is the one of a run never killed, to the last digit."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import SMALL, arguments, write_corpus

from elas.extensions import prebuild_deepspeed
from elas.launch import pretrain

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    prebuild_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def start(settings: dict, ranks: int = 2) -> list[subprocess.Popen]:
    """Start ranks without a launcher, so that each can be killed by its own id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, pretrain.__file__, *arguments(settings)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(ranks: list[subprocess.Popen]) -> str:
    """Wait for every rank; each must end well. Returns rank 0's output."""
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs[0]


def rows(run_dir: Path, name: str = "metrics") -> list[dict]:
    path = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["sparsity"]) for row in rows(run_dir)]


@pytest.mark.parametrize("zero", [1, 3])
def test_a_killed_run_continues_exactly(corpus, tmp_path, zero):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {
        **SMALL,
        "data.train": corpus,
        "data.split": "90,10,0",
        "parallel.zero": zero,
        "train.dtype": "bfloat16",
    }
    finish(start({**settings, "train.run_dir": whole}))

    ranks = start({**settings, "train.run_dir": killed})
    deadline = time.monotonic() + 200
    while not any(row["step"] >= 5 for row in rows(killed)):  # past the save at step 3, before the next one
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    done = rows(killed)[-1]["step"]
    assert done < SMALL["train.steps"]

    output = finish(start({**settings, "train.run_dir": killed}))
    assert "resumed from" in output
    assert curve(killed) == curve(whole)
    assert len(curve(whole)) == SMALL["train.steps"]
    assert rows(killed, "validation") == rows(whole, "validation")

    # A finished run started again has nothing to do, and says the same.
    finish(start({**settings, "train.run_dir": killed}))
    assert curve(killed) == curve(whole)
    assert rows(killed, "validation") == rows(whole, "validation")
