"""`elas launch slurm` before it submits, and what a job's script asks: no SLURM is needed for these."""

import shlex
import sys
from pathlib import Path

import pytest
from support.corpora import SMALL, arguments, write_corpus

from elas.errors import UserError
from elas.launch.job import read_arguments
from elas.launch.slurm import batch, submit
from elas.launch.slurm.follow import complaints
from elas.launch.sweep import of_this_task, read_sweep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return arguments({**SMALL, "data.train": prefix, "data.split": "90,10,0"})


def mistake(function, *given) -> str:
    with pytest.raises(UserError) as caught:
        function(*given)
    return str(caught.value)


def test_a_dry_run_prints_a_command_quoted_for_a_shell(corpus, tmp_path, capsys):
    run_dir = f'{tmp_path}/it\'s a; $HOME "x" *'
    options = ["--nodes=2", "--gpus-per-node=a100:2", "--time=1-0", "--max-requeues=3", "--sbatch", "--qos=low --mem=0"]
    assert submit.main([*options, "--dry-run", *corpus, "--train.run_dir", run_dir]) == 0
    words = shlex.split(capsys.readouterr().out.removeprefix("would run: "))
    assert words[:2] == [f"ELAS_PYTHON={sys.executable}", "ELAS_MAX_REQUEUES=3"]
    given, (script, *passed_on) = words[3:10], words[10:]
    expected = [
        "--parsable",
        "--nodes=2",
        "--export=ALL",
        "--gpus-per-node=a100:2",
        "--time=1-0",
        "--qos=low",
        "--mem=0",
    ]
    assert words[2] == "sbatch" and given == expected and Path(script).is_file()
    assert passed_on == [*corpus, f"--train.run_dir={run_dir}"]


def test_the_settings_are_checked_for_all_ranks_of_all_nodes(corpus, tmp_path):
    run = [*corpus, f"--train.run_dir={tmp_path}/run", "--dry-run"]
    assert "start a multiple of 4 ranks" in mistake(submit.main, ["--nodes=3", "--parallel.tensor=4", *run])
    assert "4 data-parallel" in mistake(
        submit.main, ["--nodes=2", "--ranks-per-node=2", *run, "--train.global_batch_size=10"]
    )
    assert "data.train='nothing'" in mistake(submit.main, [*run, "--data.train=nothing"])


@pytest.mark.parametrize(
    "options, said",
    [
        (["--nodes=0"], "--nodes 0: must be at least 1"),
        (["--gpus-per-node=all"], "--gpus-per-node all: is not a number of GPUs; give 8, or TYPE:8"),
        (["--time=2"], "--time 2: the job would be asked to save 120 s before the limit, so at its start"),
        (["--time=0:30", "--signal-seconds=20"], None),
        (["--time=tomorrow"], "--time tomorrow: is not a time limit; give minutes, H:M:S, or D-H:M:S"),
        (["--sbatch", "--comment='x"], "fix the quotes"),
        (["--ranks-per-node=2", "--gpus-per-node=2"], "not allowed with argument"),
        (["--sweep=none"], "--sweep none: cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_in_the_options(corpus, tmp_path, options, said):
    given = [*options, *corpus, f"--train.run_dir={tmp_path}/run", "--dry-run"]
    if said is None:
        assert submit.main(given) == 0
    else:
        assert said in mistake(submit.main, given)


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("1-0", 86400),
        ("2-1:30", 178200),
        ("0-0:0:5", 5),
        ("infinite", 0),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert submit.time_limit(text) == seconds


def test_a_sweep_says_which_line_is_wrong(corpus, tmp_path, capsys):
    sweep, run = tmp_path / "sweep", f"--train.run_dir={tmp_path}"

    def said(text: str) -> str:
        sweep.write_text(text)
        return mistake(submit.main, ["--sweep", str(sweep), *corpus, "--dry-run"]).removeprefix(f"--sweep {sweep}: ")

    assert said("") == "is empty; write the settings of one run on each line"
    assert said(f"{run}/a\n\n{run}/b\n") == "line 2 is empty; remove it, each line is one run"
    assert said(f"{run}/a 'x\n") == "line 1: No closing quotation; fix the quotes"
    assert said(f"{run}/a\n{run}/b --optimizer.lr=-1\n").startswith("line 2: optimizer.lr=-1")
    assert said(f"{run}/a\n{run}/b\n{run}/b/../a\n").startswith("lines 1 and 3 both train in")
    sweep.write_text(f"{run}/a\n{run}/b\n")
    assert submit.main(["--sweep", str(sweep), *corpus, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"ELAS_SWEEP={sweep}" in printed and "--array=0-1 --output=elas-%A_%a.out" in printed


def test_a_task_of_an_array_takes_its_line(tmp_path):
    sweep = tmp_path / "sweep"
    sweep.write_text("--train.run_dir 'a b' $HOME *\n--train.run_dir c\n")
    assert read_sweep(sweep) == [["--train.run_dir", "a b", "$HOME", "*"], ["--train.run_dir", "c"]]
    given = {"ELAS_SWEEP": str(sweep)}
    assert of_this_task({**given, "SLURM_ARRAY_TASK_ID": "1"}) == ["--train.run_dir", "c"]
    assert "has 2 lines, for tasks 0 to 1" in mistake(of_this_task, {**given, "SLURM_ARRAY_TASK_ID": "2"})
    assert "is not an array" in mistake(of_this_task, given)
    assert of_this_task({"SLURM_ARRAY_TASK_ID": "2"}) == []


def test_a_job_that_is_started_again_goes_on_with_its_own_run(corpus, tmp_path, monkeypatch):
    def resumes(value: str) -> list[str]:
        arguments = [*corpus, f"--train.run_dir={tmp_path}", f"--checkpoint.resume={value}"]
        return batch.resume_arguments(read_arguments(arguments, 1, look_at_files=False))

    assert resumes("none") == resumes("auto") == resumes("other/step_3") == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resumes("none") == ["--checkpoint.resume=auto"] and resumes("auto") == resumes("other/step_3") == []
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    assert resumes("other/step_3") == ["--checkpoint.resume=auto"]


def test_the_reasons_are_those_of_the_last_start(tmp_path):
    lines = [
        "elas: job 1, start 1: …",
        "error: n1: rank 0 (process 5) was killed by SIGTERM",
        "elas: job 1, start 2: …",
    ]
    lines += [
        "srun: error: n1: task 0: Killed",
        "error: step 7: loss nan",
        "error: n2: rank 1 (process 9) ended with status 1",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    assert complaints(tmp_path / "log") == ["step 7: loss nan", "n2: rank 1 (process 9) ended with status 1"]
    assert complaints(tmp_path / "none") == []
