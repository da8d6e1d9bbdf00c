"""`elas launch local`: started, asked to stop, started again, judged by what rank 0 left, not by an exit status."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab.hosts import wait_for
from launched import ENDLESS, LAUNCH
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import rows

from elas.launch import pretrain
from elas.launch.guard.processes import descendants

pytestmark = pytest.mark.timeout(450)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A launcher that is killed takes its ranks along: else those of a test that failed would train for ever."""
    yield
    while started:
        process = started.pop()
        process.kill()
        process.wait()


def start(run_dir, settings: dict, *options: str) -> subprocess.Popen:
    command = [*LAUNCH, "local", *options, *arguments({**settings, "train.run_dir": run_dir})]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started.append(process)
    return process


def wait_for_step(run_dir, step: int, process: subprocess.Popen) -> None:
    reached = lambda: any(row["step"] >= step for row in rows(run_dir))  # noqa: E731
    assert wait_for(lambda: reached() or process.poll() is not None, 90) and process.poll() is None


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    return {p.rank: p.pid for p in descendants(process.pid) if p.rank is not None}


def test_ctrl_c_saves_and_the_same_command_goes_on(corpus, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, {**ENDLESS, "data.train": corpus}, "--ranks", "2")
    wait_for_step(run_dir, 3, process)
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command resumes from there" in output, output
    lines = [line for line in output.splitlines() if "SIGINT" in line and not line.startswith("elas: SIGINT: ")]
    said = [line.split(" (")[0].split(" after")[0] for line in lines]  # a slow end is waited for with lines
    assert said == ["stopping", "stopped"], output  # the run's own, and not the launcher's beside them
    assert not any(os.path.exists(f"/proc/{p.pid}") for p in below)
    step = json.loads((run_dir / "REQUEUE").read_text())["step"]
    steps = {**ENDLESS, "data.train": corpus, "train.steps": step + 2}
    process = start(run_dir, steps, "--ranks", "2", "--json", str(tmp_path / "facts.json"))
    assert any(line.startswith("running: ") for line in process.stdout)
    process.stdout.close()  # nobody listens any more: it trains to its end all the same, and says so where it can
    assert process.wait(timeout=100) == 0
    assert [row["step"] for row in rows(run_dir)] == list(range(1, step + 3))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["state"], facts["status"], facts["step"], facts["world_size"]) == ("done", 0, step + 2, 2)
    assert facts["hosts"] == [{"host": os.uname().nodename, "ranks": [0, 1], "status": 0}]


def test_a_launcher_that_says_0_is_not_believed(corpus, tmp_path):
    """kill −9 of what the deepspeed launcher runs ranks with: it ends with status 0 itself."""
    process = start(tmp_path, {**ENDLESS, "data.train": corpus}, "--ranks", "2")
    wait_for_step(tmp_path, 2, process)
    below = descendants(process.pid)
    start_of_it = f"{sys.executable}\0-u\0-m\0deepspeed.launcher.launch".encode()
    (part,) = [p.pid for p in below if Path(f"/proc/{p.pid}/cmdline").read_bytes().startswith(start_of_it)]
    os.kill(part, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "error: the run did not complete" in output, output
    assert not any(os.path.exists(f"/proc/{p.pid}") for p in below)


@pytest.mark.parametrize("victim", (0, 1))
def test_the_other_rank_ends_at_once_and_says_why(corpus, tmp_path, victim):
    """kill −9 of a rank: the launcher ends the other by SIGTERM, which is no request to save."""
    process = start(tmp_path, {**ENDLESS, "data.train": corpus}, "--ranks", "2")
    wait_for_step(tmp_path, 2, process)
    pid = ranks_of(process)[victim]
    os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "will save" not in output and "Traceback" not in output, output
    rank = rf"rank {victim} \(process {pid}\) (was killed by SIGKILL|is gone)"
    assert re.search(rf"^error: {rank}; rank {1 - victim} ends too, its stacks", output, re.MULTILINE), output


def test_torchrun_begins_again_after_a_fault(corpus, tmp_path):
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.steps": 300, "checkpoint.every_steps": 5}
    process = start(tmp_path, settings, "--ranks", "2", "--launcher", "torchrun", "--restarts", "1")
    assert wait_for(lambda: list(tmp_path.glob("checkpoints/step_*[0-9]")) or process.poll() is not None, 90)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "done: step 300" in output and "resumed from" in output, output
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 301))


@pytest.mark.parametrize(
    "given, said",
    [
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--ranks", "3"], "train.global_batch_size=8"),
        (["--restarts", "2"], "--restarts 2: the deepspeed launcher cannot restart ranks; add --launcher torchrun"),
        (["--master-port", "70000"], "--master-port 70000: must be from 1 to 65535"),
        (["--launcher", "mpi"], "--launcher mpi: unknown; give one of deepspeed, torchrun"),
        (["--ranks", "two"], "--ranks two: cannot be read; give a whole number"),
        (["--modle.hidden_size", "3"], "unknown key; did you mean model.hidden_size?"),
        (["--ranks", "2", "--parallel.tensor", "3"], "does not divide the world size 2"),
        (["--checkpoint.init_from", "nowhere"], "checkpoint.init_from='nowhere': no such folder"),
        (["--checkpoint.resume", "nowhere"], "checkpoint.resume='nowhere': no such folder"),
        (["--deepspeed_config", "nowhere"], "parallel.deepspeed_config='nowhere'"),
        pytest.param(
            ["--sparsity.implementation", "triton"],
            "triton",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it works here"),
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(corpus, tmp_path, capsys, given, said):
    from elas.cli import run
    from elas.command import exit_status

    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": tmp_path / "run"}
    assert exit_status(run, ["launch", "local", *arguments(settings), *given]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_a_command_that_a_shell_can_run(corpus, tmp_path, capsys):
    from elas.cli import run

    settings = {**ENDLESS, "data.train": corpus, "train.run_dir": tmp_path / "a run; $x"}
    assert run(["launch", "local", "--ranks", "2", "--dry-run", *arguments(settings)]) == 0
    line = capsys.readouterr().out.strip().removeprefix("would run: ")
    words = subprocess.run(["sh", "-c", f'printf "%s\\n" {line}'], capture_output=True, text=True).stdout.splitlines()
    assert pretrain.__file__ in words and f"--train.run_dir={tmp_path / 'a run; $x'}" in words
