"""The SLURM recipes, as far as they run without a cluster and without the network.

Data: `hf` is replaced by a program that writes files like C4's from Python's library, and all of `elas prep` runs.
Plan and submission run as they stand there, up to sbatch's command line; then what the job's script asks of it runs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from started import copied, start

pytestmark = pytest.mark.timeout(600)

HF = """
import gzip, json, sys, sysconfig
from pathlib import Path

words = sys.argv[1:]
out = Path(words[words.index("--local-dir") + 1], "en")
out.mkdir(parents=True, exist_ok=True)
(out.parent.parent / "hf.json").write_text(json.dumps(words))
texts = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
for name, some in {"train.00000-of-01024": texts, "validation.00000-of-00008": texts[:10]}.items():
    if (out / f"c4-{name}.json.gz").exists():  # as the real one
        continue
    with gzip.open(out / f"c4-{name}.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\\n" for text in some)
"""


class Site:
    """A login node: `elas` and `hf` on the PATH, and a shared folder."""

    def __init__(self, folder: Path):
        self.folder, self.shared = folder, folder / "shared"
        self.shared.mkdir()
        self.scripts = copied("slurm", folder)
        (folder / "bin").mkdir()
        (folder / "hf.py").write_text(HF)
        python, no_cluster = f"exec {shlex.quote(sys.executable)}", "echo no cluster >&2; exit 1"
        programs = {"elas": f'{python} -m elas.cli "$@"', "hf": f'{python} {folder}/hf.py "$@"'}
        for name, line in {**programs, "sinfo": no_cluster, "sbatch": no_cluster}.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / "bin" / name).chmod(0o755)
        self.path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])

    def bash(self, script: str, *words: object, status: int = 0, **environment: str) -> str:
        """Run one of the scripts."""
        environment = {"SHARED": str(self.shared), "PATH": self.path, **environment}
        return start(["bash", self.scripts / script, *words], self.folder, 180, status, **environment)

    def submitted(self, output: str) -> tuple[dict[str, str], list[str], Path, list[str]]:
        """What a dry run would submit: variables, options of sbatch, the job's script, and its arguments."""
        words = shlex.split(re.search(r"^would run: (.*)", output, re.MULTILINE)[1])
        at = words.index("sbatch")
        options = [word for word in words[at + 1 :] if word.startswith("-")]
        script = next(word for word in words[at + 1 :] if not word.startswith("-"))
        given = words[words.index(script) + 1 :]
        return (
            dict(word.split("=", 1) for word in words[:at]),
            options[: len(options) - len(given)],
            Path(script),
            given,
        )

    def in_the_job(self, given: list[str], **environment: str) -> list[str]:
        """Folder, steps and arguments of the ranks, by the program that the job's script asks for them."""
        command = [sys.executable, "-m", "elas.launch.slurm.batch", "16", *given]
        folder = self.shared if environment else self.folder
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.split("\0")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """With the data of the recipe, prepared by its own commands."""
    site = Site(tmp_path_factory.mktemp("site"))
    site.bash("1b_c4_2nodes.sh", "data")
    return site


def test_the_data_is_prepared(site):
    """By `elas prep` itself, from two files; and the real `hf` accepts the download's options."""
    assert "ok " in site.bash("1b_c4_2nodes.sh", "verify")
    train, valid = (json.loads((site.shared / f"c4/{name}.manifest.json").read_text()) for name in ("train", "valid"))
    assert train["vocab_size"] == valid["vocab_size"] == 32000
    assert valid["documents"] == 10 < train["documents"]
    words = json.loads((site.shared / "hf.json").read_text())
    words[words.index("--local-dir") + 1] = "nothing-here-yet"
    command = [Path(sys.executable).parent / "hf", *words]
    output = start(command, site.folder, 60, status=1, HF_HUB_OFFLINE="1", HF_HOME=str(site.folder / "hub"))
    assert "offline" in output.lower() and "usage" not in output.lower(), output


def test_on_a_cluster_the_tokens_are_an_array_job(site):
    """The options parse, and then there is no cluster here."""
    other = site.folder / "other"
    shutil.copytree(site.shared / "c4", other / "c4", ignore=shutil.ignore_patterns("train.*", "valid.*"))
    done = site.bash("1b_c4_2nodes.sh", "data", status=2, SHARED=str(other), CPU_PARTITION="cpu")
    assert "error: --executor slurm: the SLURM cluster does not answer (no cluster)" in done, done


def test_the_plan_agrees(site):
    """The layout of the YAML fits into 16 H100s, and is within 10 % of the fastest."""
    target = site.folder / "plan.json"
    site.bash("1b_c4_2nodes.sh", "plan", "--json", target)
    facts = json.loads(target.read_text())
    layout = dict(tp=4, pp=1, vpp=1, dp=4, sequence=True, zero=1, micro_batch_size=128, recompute="none")
    (row,) = [row for row in facts["rows"] if row.items() >= layout.items()]
    assert row["fits"] and row["memory_gb"] < 40
    assert row["step_s"] < 1.1 * facts["recommended"]["step_s"]
    assert 13e9 < facts["tokens"] < 13.2e9


def test_the_job_that_would_be_submitted(site):
    """Checked for 16 ranks, with the options of two nodes of eight GPUs; its script is valid, and finds the run."""
    output = site.bash("1b_c4_2nodes.sh", "submit", "--dry-run")
    _, options, script, given = site.submitted(output)
    assert {"--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96", "--time=12:00:00"} <= set(options)
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    run_dir, steps, *arguments = site.in_the_job(given)
    assert (run_dir, steps) == (f"{site.shared}/runs/1b-c4", "100000")
    assert f"--data.train={site.shared}/c4/train" in arguments
    why = site.bash("1b_c4_2nodes.sh", "submit", "--dry-run", "--parallel.tensor", "3", status=2)
    assert re.search(r"^error: .*parallel.tensor", why, re.MULTILINE), why


def test_the_sweep(site):
    """One array task for each line, two at a time, each with its own rate and folder."""
    _, options, _, given = site.submitted(site.bash("sweep.sh", "--dry-run"))
    variables = {"ELAS_SWEEP": str(site.scripts / "sweep.txt")}
    assert options[-1] == "--array=0-3%2"  # the last one holds, for sbatch
    assert "--array=0-3" in options and "--output=elas-%A_%a.out" in options
    for task, rate in {0: "1e-3", 3: "8e-3"}.items():
        run_dir, steps, *arguments = site.in_the_job(given, **variables, SLURM_ARRAY_TASK_ID=str(task))
        assert (run_dir, steps) == (f"runs/1b-lr-{rate}", "10000")
        assert f"--optimizer.lr={rate}" in arguments
