"""Training runs as processes of their own, without a launcher, so that each rank can be dealt with by its id."""

import json
import os
import time
from pathlib import Path

from elas.launch import pretrain
from elas.launch.local import free_port
from support.corpora import arguments
from support.device import needs_gpus
from support.forked import Forked


def start(settings: dict, ranks: int = 2, program: str = pretrain.__file__) -> list[Forked]:
    """Start ranks without a launcher, so that each can be killed by its own id."""
    needs_gpus(ranks)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = {**os.environ, **where, "WORLD_SIZE": str(ranks)}
    command = [program, *arguments(settings)]
    return [Forked(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def finish(ranks: list[Forked]) -> str:
    """Wait for every rank; each must end well. Returns rank 0's output."""
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs[0]


def rows(run_dir: Path, name: str = "metrics") -> list[dict]:
    path = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["sparsity"]) for row in rows(run_dir)]


def validations(run_dir: Path) -> list[dict]:
    """Validations of a run, without the time at which they were."""
    timed = ("time", "elapsed_s")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(run_dir, "validation")]


def wait_for_step(run_dir: Path, step: int, ranks: list[Forked]) -> None:
    """Return when a run has logged a step; fails when a rank ends before."""
    deadline = time.monotonic() + 200
    while not any(row["step"] >= step for row in rows(run_dir)):
        assert time.monotonic() < deadline
        ended = [rank for rank in ranks if rank.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(0.01)
