"""The same file with the same arguments, started by each launcher, trains the same model."""

import json
import os
import signal
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
REPOSITORY = Path(pretrain.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return {**SMALL, "train.steps": 4, "data.train": corpus, "data.split": "90,10,0", "checkpoint.every_steps": 0}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def losses(command: list[str], run_dir: Path, **environment: str) -> list[float]:
    """Run a command to its end; the losses it left in `run_dir`."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        command,
        env={**clean, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_launcher_trains_the_same_model(settings, tmp_path):
    def given(name: str) -> list[str]:
        return arguments({**settings, "train.run_dir": tmp_path / name})

    zero1 = str(REPOSITORY / "ds_configs" / "zero1.json")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]
    curves = {
        "alone": losses([sys.executable, "-m", "elas.cli", "train", *given("alone")], tmp_path / "alone"),
        "deepspeed": losses(
            [*deepspeed, "--master_port", port(), pretrain.__file__, "--deepspeed_config", zero1, *given("deepspeed")],
            tmp_path / "deepspeed",
        ),
        "torchrun": losses(
            [*torchrun, pretrain.__file__, "--parallel.tensor=2", "--parallel.sequence=true", *given("torchrun")],
            tmp_path / "torchrun",
        ),
        "srun": losses(  # what srun sets, for a job of one task
            [sys.executable, pretrain.__file__, *given("srun")],
            tmp_path / "srun",
            SLURM_PROCID="0",
            SLURM_NTASKS="1",
            SLURM_LOCALID="0",
            SLURM_JOB_ID="7",
        ),
    }
    assert curves["srun"] == curves["alone"] and len(curves["alone"]) == 4
    for name in ("deepspeed", "torchrun"):  # two ranks: sums in another order
        assert curves[name] == pytest.approx(curves["alone"], rel=2e-5)


def test_srun_with_several_tasks_needs_an_address(settings, tmp_path):
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, pretrain.__file__, *arguments({**settings, "train.run_dir": tmp_path / "run"})]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "MASTER_ADDR" in result.stderr and len(result.stderr.splitlines()) == 1


def test_torchrun_starts_again_by_itself_with_the_ranks_that_are_left(settings, tmp_path):
    """Two agents of one rank each; one is killed with its worker, the other goes on alone from its checkpoint."""
    run_dir = tmp_path / "run"
    more = {"train.steps": 400, "checkpoint.every_steps": 5, "train.timeout_seconds": 8, "train.run_dir": run_dir}
    elastic = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_backend", "c10d"]
    elastic += ["--rdzv_endpoint", f"127.0.0.1:{port()}", "--rdzv_id", "elastic", "--local_addr", "127.0.0.1"]
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
    assert [row["step"] for row in rows] == list(range(1, 401)) and (run_dir / "DONE").exists()
