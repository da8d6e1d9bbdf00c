"""`elas quickstart`, shortened: the whole chain on two ranks, and a bound on what the model has learned."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULT = DOCS / "experiments" / "results" / "quickstart.json"
STEPS = 60


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Folder, facts and output of a quickstart of `STEPS` steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "elas.cli", "quickstart", "--workdir", str(folder / "work")]
    command += ["--steps", str(STEPS), "--json", str(folder / "facts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "facts.json").read_text()), done.stdout


def test_quickstart_learns(quickstart):
    """It came to 247, and 40 steps on Python 3.12 to 324; and 2:4 was on."""
    _, facts, _ = quickstart
    assert facts["tokens_trained"] == STEPS * 2048
    assert facts["world_size"] == 2
    assert facts["val_ppl_start"] > 8192  # an untrained model knows less than nothing of 8,192 pieces
    assert facts["val_ppl_end"] < 300
    assert facts["dropped"] > 0  # 2:4 is reached by a shortened run too


def test_quickstart_corpus_is_the_one_measured(quickstart):
    """Another choice of files would make README's figure false; Pythons differ by a few per cent."""
    _, facts, _ = quickstart
    assert facts["corpus_tokens"] == pytest.approx(json.loads(RESULT.read_text())["corpus_tokens"], rel=0.1)


def test_every_column_of_its_metrics_is_documented(quickstart):
    folder, _, _ = quickstart
    (metrics,) = (folder / "work").rglob("metrics.jsonl")
    columns = {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
    table = [line for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table)))
    assert {"lr_other", "optimizer_s", "dropped"} <= columns  # of Muon and of 2:4
    assert columns <= documented
