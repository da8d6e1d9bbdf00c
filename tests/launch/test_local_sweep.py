"""`elas launch local --sweep`: every run in its folder, a finished one skipped, a failed one alone in failing."""

import json
import os
import signal
import subprocess

import pytest
from lab.hosts import wait_for
from launched import ENDLESS, LAUNCH
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import rows

from elas import cli
from elas.command import exit_status

pytestmark = pytest.mark.timeout(900)
SPIKES = "--train.on_spike stop --train.spike_nats 1e-6 --train.steps 40 --optimizer.lr 1e-9"
"""It learns nothing, so a loss above the median, which counts as a spike here, comes soon."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def sweep(tmp_path, lines: list[str], settings: dict, *options: str) -> subprocess.Popen:
    (tmp_path / "sweep").write_text("\n".join(lines) + "\n")
    command = [*LAUNCH, "local", "--ranks=1", f"--sweep={tmp_path}/sweep", f"--json={tmp_path}/facts.json", *options]
    return subprocess.Popen(
        [*command, *arguments(settings)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_sweep_goes_past_failures_and_skips_what_is_done(corpus, tmp_path):
    good, bad = f"--train.run_dir '{tmp_path}/a b'", f"--train.run_dir {tmp_path}/bad {SPIKES}"
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.steps": 4}
    for lines, states, status in (([bad, good], ["failed", "done"], 1), ([good], ["skipped"], 0)):
        process = sweep(tmp_path, lines, settings)
        output = process.communicate(timeout=600)[0]
        runs = json.loads((tmp_path / "facts.json").read_text())["runs"]
        assert [run["state"] for run in runs] == states and process.returncode == status, output
        assert [run["line"] for run in runs] == list(range(1, len(lines) + 1)) and runs[-1]["val_loss"] > 0
        assert all(run["run_dir"] in line for run, line in zip(runs, output.splitlines()[-len(runs) :]))  # the table
        if status:
            assert runs[0]["status"] == 1 and f"run 1/2 ({tmp_path}/bad): failed" in output
            assert "lower optimizer.lr" in output  # why
    assert [row["step"] for row in rows(tmp_path / "a b")][-1] == 4
    assert "\nrunning: " in "\n" + (tmp_path / "a b" / "launch.log").read_text()


def test_a_sweep_that_is_stopped_saves_and_starts_no_more(corpus, tmp_path):
    lines = [f"--train.run_dir {tmp_path}/{name}" for name in "abc"]
    process = sweep(tmp_path, lines, {**ENDLESS, "data.train": corpus}, "--parallel=2")
    for name in "ab":
        assert wait_for(lambda: any(row["step"] >= 2 for row in rows(tmp_path / name)), 300)  # noqa: B023
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=240)[0]
    runs = json.loads((tmp_path / "facts.json").read_text())["runs"]
    assert process.returncode == 130, output
    assert [run["state"] for run in runs] == ["stopped", "stopped", "not started"], output
    assert all(run["checkpoint"] for run in runs[:2]) and not (tmp_path / "c").exists()


def test_mistakes_of_a_sweep_are_told_before_anything_starts(corpus, tmp_path, capsys):
    settings = arguments({**SMALL, "data.train": corpus, "data.split": "90,10,0"})
    file = tmp_path / "sweep"
    for text, options, why in (
        (f"--train.run_dir {tmp_path}/a\n--train.run_dir {tmp_path}/a\n", [], "lines 1 and 2 both train in"),
        (f"--train.run_dir {tmp_path}/a\n--optimiser.lr 1\n", [], "line 2: optimiser.lr"),
        ("\n", [], "line 1 is empty"),
        (f"--train.run_dir {tmp_path}/a\n", ["--parallel=0"], "--parallel 0"),
        (f"--train.run_dir {tmp_path}/a\n", ["--master-port=29600"], "--master-port 29600: not with --sweep"),
    ):
        file.write_text(text)
        assert exit_status(cli.run, ["launch", "local", f"--sweep={file}", *options, *settings]) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
    assert exit_status(cli.run, ["launch", "local", "--parallel=2", *settings]) == 2
    assert "only with --sweep" in capsys.readouterr().err
    file.write_text(f"--train.run_dir {tmp_path}/a\n--train.run_dir {tmp_path}/b\n")
    assert exit_status(cli.run, ["launch", "local", f"--sweep={file}", "--dry-run", *settings]) == 0
    assert capsys.readouterr().out.count("would run: elas launch local --ranks=1") == 2
    assert not (tmp_path / "a").exists()
