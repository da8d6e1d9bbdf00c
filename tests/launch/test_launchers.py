"""The same file with the same arguments, started by each launcher, trains the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import free_port

from elas.extensions import prebuild_deepspeed
from elas.launch import pretrain

pytestmark = pytest.mark.timeout(300)
REPOSITORY = Path(pretrain.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return {**SMALL, "train.steps": 4, "data.train": corpus, "data.split": "90,10,0", "checkpoint.every_steps": 0}


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
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    curves = {
        "alone": losses([sys.executable, "-m", "elas.cli", "train", *given("alone")], tmp_path / "alone"),
        "deepspeed": losses(
            [
                *deepspeed,
                "--master_port",
                str(free_port()),
                pretrain.__file__,
                "--deepspeed_config",
                zero1,
                *given("deepspeed"),
            ],
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
