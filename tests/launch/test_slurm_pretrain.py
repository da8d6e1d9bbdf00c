"""`elas launch slurm` and launch/slurm/pretrain.sbatch under a real SLURM of two nodes: jobs that are disturbed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import Lab, Slurm, why_not
from lab.hosts import wait_for
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import curve, rows

from elas.extensions import prebuild_deepspeed
from elas.launch import pretrain

pytestmark = [
    pytest.mark.timeout(450),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
SCRIPT = Path(pretrain.__file__).resolve().parent / "slurm" / "pretrain.sbatch"
OURS = ("munged ", "slurmd ", "slurmstepd")
ODD = 'it\'s a; $HOME "x" *'
SLOW_MBIT = 8
"""With a cable so thin a step takes a third of a second, and a run of these lasts until its time is over."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    prebuild_deepspeed()
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        yield Slurm(lab, gpus=2)
    finally:
        lab.close()


@pytest.fixture(autouse=True)
def nothing_is_left(slurm):
    yield
    slurm.run(["scancel", "--user=root"])
    wait_for(lambda: not slurm.run(["squeue", "-h"]).stdout, 30)
    assert wait_for(lambda: not left(slurm), 10), left(slurm)


def left(slurm) -> dict[str, list[str]]:
    """Processes of jobs that still run, by host."""
    found = {
        host.name: [args for args in host.processes().values() if not args.startswith(OURS)] for host in slurm.lab.nodes
    }
    return {name: processes for name, processes in found.items() if processes}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    more = {"train.steps": 100, "checkpoint.every_steps": 20, "train.eval_every": 0}
    return {**SMALL, "data.train": corpus, "data.split": "90,10,0", **more}


def start(slurm, folder: Path, options: list[str], settings: dict) -> subprocess.Popen:
    """Start `elas launch slurm` on the head; its logs and its JSON go into a folder."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "elas.cli", "launch", "slurm", f"--json={folder}/facts.json"]
    command += ["--sbatch", f"--output='{folder}/%A_%a.log'" if "--sweep" in options else f"--output='{folder}/log'"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return slurm.lab.head.start([*command, *options, *arguments(settings)], slurm.env, **pipes)


def finish(waiting: subprocess.Popen, seconds: float) -> tuple[int, str, str]:
    try:
        out, err = waiting.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        waiting.kill()
        out, err = waiting.communicate()
        pytest.fail(f"still waiting after {seconds} s\n{out[-5000:]}\n{err[-5000:]}")
    return waiting.returncode, out, err


def facts(folder: Path) -> dict:
    wait_for((folder / "facts.json").exists, 30)
    return json.loads((folder / "facts.json").read_text())


def reach(run_dir: Path, step: int, log: Path) -> None:
    """Return when a run has logged a step."""
    good = wait_for(lambda: any(row["step"] >= step for row in rows(run_dir)), 180)
    assert good, log.read_text() if log.exists() else "no log"


def began_again(slurm, number: str, times: int, seconds: float) -> None:
    """Return when a job runs for the so-manieth time."""
    assert wait_for(lambda: slurm.job(number)["Restarts"] == str(times), seconds), slurm.job(number)
    assert wait_for(lambda: slurm.job(number)["JobState"] == "RUNNING", 30), slurm.job(number)


@pytest.fixture(scope="module")
def faulty(slurm, settings, tmp_path_factory) -> dict[str, tuple[Path, subprocess.Popen, float]]:
    """Two jobs, a rank of one killed, a rank of the other stopped: folder, who waits for it, and when that was."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("stopped", "killed")}
    more = {**settings, "train.steps": 5000}
    waiting = {
        name: start(slurm, folder, ["--nodes=2", "--wait"], {**more, "train.run_dir": folder / "run"})
        for name, folder in folders.items()
    }
    found = {}
    for name, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
        reach(folders[name] / "run", 3, folders[name] / "log")
        host = slurm.lab.hosts["n2"]
        host.run(["kill", f"-{int(number)}", str(rank_on(host, folders[name] / "run"))])
        found[name] = folders[name], waiting[name], time.time()
    return found


def rank_on(host, run_dir: Path) -> int:
    """The process of the one rank that a run has on a host, as the host numbers it."""
    pids = [pid for pid, args in host.processes().items() if str(run_dir) in args]
    ranks = [pid for pid in pids if b"\0RANK=" in environ(host, pid)]
    assert len(ranks) == 1, host.processes()
    return ranks[0]


def environ(host, pid: int) -> bytes:
    return host.run(["cat", f"/proc/{pid}/environ"]).stdout.encode()


@pytest.fixture(scope="module")
def sweep(slurm, settings, tmp_path_factory) -> tuple[Path, tuple[int, str, str]]:
    """Two runs at once, each over both nodes, and how the command that waited for them ended."""
    folder = tmp_path_factory.mktemp("sweep")
    odd = shlex.quote(f"{folder}/{ODD}")
    (folder / "sweep").write_text(f"--train.run_dir {folder}/whole\n--train.run_dir {odd} --train.seed=7\n")
    waiting = start(slurm, folder, ["--nodes=2", "--wait", "--sweep", f"{folder}/sweep"], settings)
    return folder, finish(waiting, 240)


def test_a_rank_that_is_killed_or_stopped_ends_its_job(slurm, faulty, sweep):
    """Within a minute; the sweep runs meanwhile, on the same nodes."""
    for name, said in (
        ("killed", "(was killed by SIGKILL|was the first to end)"),
        ("stopped", "has been stopped by a signal"),
    ):
        folder, waiting, then = faulty[name]
        status, out, err = finish(waiting, 150)
        assert status == 1, out + err
        number, log = facts(folder)["job"], (folder / "log").read_text()
        assert re.search(rf"^error: n2: rank \d \(process \d+\) {said}", log, re.M), log
        assert re.search(rf"^error: job {number} FAILED .*n2: rank \d .*{said}.* its log is {folder}/log", err, re.M), (
            err
        )
        job = slurm.job(number)
        assert job["Restarts"] == "0" and job["ExitCode"] != "0:0"
        assert time.mktime(time.strptime(job["EndTime"], "%Y-%m-%dT%H:%M:%S")) - then < 60


def test_a_sweep_is_an_array_with_its_arguments_unchanged(slurm, settings, sweep):
    folder, (status, out, err) = sweep
    assert status == 0, out + err
    described = facts(folder)
    assert described["log"] == f"{folder}/{described['job']}_*.log"
    assert [run["state"] for run in described["runs"]] == ["done", "done"]
    assert [Path(run["run_dir"]).name for run in described["runs"]] == ["whole", ODD]
    assert len(curve(folder / "whole")) == len(curve(folder / ODD)) == settings["train.steps"]
    assert curve(folder / "whole") != curve(folder / ODD)
    assert "2 × 1 ranks on n[1-2]" in (folder / f"{described['job']}_1.log").read_text()


def test_a_job_disturbed_five_times_equals_an_undisturbed_one(slurm, settings, sweep, tmp_path):
    """Its time is over, it is preempted, requeued by hand, a node does not take its part, and one crashes."""
    log, run_dir, lab = tmp_path / "log", tmp_path / "run", slurm.lab
    for host in lab.nodes:
        lab.shape(host, SLOW_MBIT)
    options = ["--nodes=2", "--time=20", "--signal-seconds=90", "--wait"]
    waiting = start(slurm, tmp_path, options, {**settings, "train.run_dir": run_dir, "train.timeout_seconds": 20})
    number = facts(tmp_path)["job"]

    reach(run_dir, 3, log)
    slurm.run(["scontrol", "update", f"job={number}", "TimeLimit=2"])
    began_again(slurm, number, 1, 60)  # SLURM looks at its clock every 30 s
    slurm.run(["scontrol", "update", f"job={number}", "TimeLimit=20"])
    assert "time limit reached: requeued" in log.read_text()

    trained(run_dir, log, start_number=2)
    slurm.run(["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"])
    began_again(slurm, number, 2, 30)
    assert "preempted: requeued" in log.read_text()

    trained(run_dir, log, start_number=3)
    slurm.run(["scontrol", "requeue", number])
    lose_a_slurmd(slurm, number, "n2")
    began_again(slurm, number, 4, 30)
    # whichever is faster: the script, or SLURM, which then requeues the job itself
    assert re.search("a node does not answer: requeued|DUE TO NODE FAILURE", log.read_text())

    trained(run_dir, log, start_number=5)
    crash(slurm, number, "n1", 5)
    lab.unshape(lab.hosts["n2"])  # n1's cable is a new one

    status, out, err = finish(waiting, 150)
    text = log.read_text()
    assert status == 0, out + err
    assert out.count("elas: job ") == text.count("elas: job ") == 6 and f"done: job {number}" in out
    assert facts(tmp_path)["runs"][0]["step"] == settings["train.steps"]
    # asked by SIGUSR1 twice, and by the SIGTERM of `scontrol requeue`: the next start continues with that step
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+)", text)]
    resumed = [int(step) for step in re.findall(r"resumed from .* at step (\d+)", text)]
    assert len(stopped) == 3 and stopped == resumed[:3], (stopped, resumed)
    assert curve(run_dir) == curve(sweep[0] / "whole")


def trained(run_dir: Path, log: Path, *, start_number: int) -> None:
    """Return when a job's n-th start has made a few steps of its own."""
    began = f"start {start_number}:"
    wait_for(lambda: "resumed from" in log.read_text().partition(began)[2], 60)
    step = int(re.findall(r"resumed from .* at step (\d+)", log.read_text().partition(began)[2])[-1])
    reach(run_dir, step + 2, log)


def lose_a_slurmd(slurm, number: str, name: str) -> None:
    """Kill the slurmd of a host just before a job starts there; bring it back when the job is in the queue again."""
    assert wait_for(lambda: slurm.job(number)["JobState"] == "PENDING", 30), slurm.job(number)
    time.sleep(3)  # it may start after six
    host = slurm.lab.hosts[name]
    (pid,) = [pid for pid, args in host.processes().items() if args.startswith("slurmd ")]
    host.run(["kill", "-9", str(pid)])
    assert wait_for(lambda: slurm.job(number)["Restarts"] == "4", 60), slurm.job(number)
    slurm.start_slurmd(host)


def crash(slurm, number: str, name: str, times: int) -> None:
    """Crash a host, bring it back when its job is in the queue again, return when that runs for the so-manieth time."""
    slurm.lab.hosts[name].crash()
    assert wait_for(lambda: slurm.job(number)["Restarts"] == str(times), 60), slurm.job(number)
    slurm.start_node(slurm.lab.restart(name))
    began_again(slurm, number, times, 30)


def test_gpus_give_the_ranks_and_no_job_is_queued_again_for_ever(slurm, settings, tmp_path):
    """And whoever waits for a job may stop waiting for it."""
    settings = {**settings, "train.run_dir": tmp_path / "run", "train.steps": 5000}
    options = ["--gpus-per-node=2", "--max-requeues=0", "--wait"]
    waiting = start(slurm, tmp_path, options, settings)
    number = facts(tmp_path)["job"]
    reach(tmp_path / "run", 2, tmp_path / "log")
    head = slurm.lab.head
    (waits,) = [pid for pid, args in head.processes().items() if args.startswith(sys.executable)]
    head.run(["kill", "-INT", str(waits)])
    status, _, err = finish(waiting, 20)
    assert status == 130 and f"job {number} keeps running" in err and f"scancel {number}" in err
    assert slurm.job(number)["JobState"] == "RUNNING"
    slurm.run(["scancel", "--batch", "--signal=USR1", number])
    slurm.wait_for_jobs(30)
    log = (tmp_path / "log").read_text()
    assert slurm.job(number)["ExitCode"] == "1:0" and "ELAS_MAX_REQUEUES=0" in log
    assert "DP 2" in log and "1 × 2 ranks on n" in log
    saved = json.loads((tmp_path / "run" / "REQUEUE").read_text())
    assert saved["stopped"] == "SIGUSR1" and Path(saved["checkpoint"]).is_dir()


def test_mistakes_are_one_line(slurm, settings, tmp_path):
    run = {**settings, "train.run_dir": tmp_path / "run"}
    for options, more, said in (
        (["--partition=labb"], {}, "--partition labb: no such partition; give one of lab, urgent"),
        (["--nodes=3"], {}, "train.global_batch_size=8: not divisible by"),
        (
            ["--sbatch", "--constraint=none"],
            {},
            "sbatch rejected the job: Invalid feature specification; fix the options",
        ),
    ):
        status, out, err = finish(start(slurm, tmp_path, options, {**run, **more}), 150)
        assert status == 2 and len(err.splitlines()) == 1 and said in err, out + err
    # and without this command: in the job's log, once, before any rank
    command = ["sbatch", "--wait", "--nodes=2", f"--output={tmp_path}/log", str(SCRIPT), *arguments(run)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = slurm.run([*command, "--model.hidden_size=65"], env={"PATH": path}, check=False)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 2 and len(log.splitlines()) == 1 and "error: model.hidden_size=65" in log, log
