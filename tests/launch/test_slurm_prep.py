"""`elas prep` under a real SLURM of two nodes: datatrove's executor, and launch/slurm/prep.sbatch."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, Slurm, why_not
from lab.hosts import wait_for

from elas.launch import pretrain

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
SCRIPT = Path(pretrain.__file__).resolve().parent / "slurm" / "prep.sbatch"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        yield Slurm(lab)
    finally:
        lab.close()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": f"document {i} " + "all human beings are born free " * (i % 30)}) + "\n")
    corpus = ["--input", f"{folder}/corpus.jsonl"]
    elas(["tokenizer", *corpus, "--vocab-size", "300", "--output", f"{folder}/tokenizer"])
    return [*corpus, "--tokenizer", f"{folder}/tokenizer", "--task-bytes", "100000"]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("local") / "all"
    elas(["tokenize", *arguments, "--output", str(prefix)])
    return prefix


def elas(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "elas.cli", "prep", *arguments], check=True, capture_output=True)


def same(left: Path, right: Path) -> bool:
    def digests(prefix):
        ends = ".bin", ".idx", ".manifest.json", ".skipped.jsonl"
        return [hashlib.sha256(Path(f"{prefix}{end}").read_bytes()).hexdigest() for end in ends]

    return digests(left) == digests(right)


def test_datatroves_executor_gives_the_files_of_a_local_run(slurm, arguments, undisturbed, tmp_path):
    prefix = tmp_path / "all"
    command = ["elas", "prep", "tokenize", *arguments, "--output", str(prefix), "--executor", "slurm"]
    slurm.run([*command, "--slurm-partition", "lab", "--workers", "4"], env={"PATH": PATH})
    slurm.wait_for_jobs(240)
    assert same(prefix, undisturbed)
    assert not Path(f"{prefix}.work").exists()


def submit(slurm, arguments: list[str], prefix: Path, **environment: str) -> str:
    """Submit prep.sbatch on two nodes; the job's number."""
    options = ["--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={prefix}.log"]
    command = ["sbatch", *options, str(SCRIPT), *arguments, "--output", str(prefix)]
    return slurm.run(command, env={"PATH": PATH, **environment}).stdout.strip()


def test_two_nodes_of_prep_sbatch(slurm, arguments, undisturbed, tmp_path):
    prefix = tmp_path / "with space" / "all"
    prefix.parent.mkdir()
    number = submit(slurm, arguments, prefix)
    slurm.wait_for_jobs(120)
    assert slurm.job(number)["ExitCode"] == "0:0", Path(f"{prefix}.log").read_text()
    assert same(prefix, undisturbed)


def test_prep_sbatch_at_its_time_limit_goes_on_after_a_requeue(slurm, arguments, undisturbed, tmp_path):
    prefix = tmp_path / "all"
    number = submit(slurm, arguments, prefix)
    done = Path(f"{prefix}.work/datatrove/completions")
    assert wait_for(lambda: done.is_dir() and any(done.iterdir()), 60)
    slurm.run(["scancel", "--batch", "--signal=USR1", number])  # what `--signal=B:USR1@60` sends
    slurm.wait_for_jobs(120)
    job, log = slurm.job(number), Path(f"{prefix}.log").read_text()
    assert (job["Restarts"], job["ExitCode"]) == ("1", "0:0"), log
    assert "requeued" in log
    assert same(prefix, undisturbed)


def test_prep_sbatch_is_not_queued_again_for_ever(slurm, arguments, tmp_path):
    prefix = tmp_path / "all"
    number = submit(slurm, arguments, prefix, ELAS_MAX_REQUEUES="0")
    assert wait_for(lambda: Path(f"{prefix}.work").is_dir(), 60)
    slurm.run(["scancel", "--batch", "--signal=USR1", number])
    slurm.wait_for_jobs(60)
    assert slurm.job(number)["ExitCode"] == "1:0"
    assert "ELAS_MAX_REQUEUES" in Path(f"{prefix}.log").read_text()


def test_prep_sbatch_with_a_mistake_fails_once_and_says_why(slurm, arguments, tmp_path):
    prefix = tmp_path / "all"
    number = submit(slurm, [*arguments, "--min-chars", "0"], prefix)
    slurm.wait_for_jobs(60)
    assert slurm.job(number)["ExitCode"] == "2:0"
    assert "--min-chars" in Path(f"{prefix}.log").read_text()


def test_an_unknown_partition_is_one_line_before_any_start(slurm, arguments, tmp_path):
    command = ["elas", "prep", "tokenize", *arguments, "--output", f"{tmp_path}/all", "--executor", "slurm"]
    done = slurm.run([*command, "--slurm-partition", "labb"], env={"PATH": PATH}, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--slurm-partition labb: no such partition; give one of lab, urgent")
    assert not list(tmp_path.iterdir())


def test_sbatch_refuses_in_one_line_and_flags_reach_both_jobs(slurm, arguments, tmp_path):
    prefix = tmp_path / "all"
    command = ["elas", "prep", "tokenize", *arguments, "--output", str(prefix), "--executor", "slurm"]
    command += ["--slurm-partition", "lab"]
    refused = slurm.run([*command, "--slurm-time", "soon"], env={"PATH": PATH}, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "Invalid" in refused.stderr  # SLURM's own words come first
    assert "sbatch refused the job (status 255); correct the --slurm-… and --sbatch options" in refused.stderr
    slurm.run([*command, "--sbatch", "hold", "comment=ours"], env={"PATH": PATH})
    held = slurm.run(["squeue", "-h", "-o", "%r"]).stdout.split()
    slurm.run(["scancel", "--user=root"])
    assert len(held) == 2 and "JobHeldUser" in held
    for script in ("datatrove/launch_script.slurm", "merge.slurm"):
        lines = Path(f"{prefix}.work", script).read_text().splitlines()
        assert "#SBATCH --hold" in lines and "#SBATCH --comment=ours" in lines
