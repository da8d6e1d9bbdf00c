"""Exports and imports that a full disk or a kill ends leave nothing that looks whole, and can be repeated."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.folders import write_model

from elas.cli import run
from elas.command import exit_status
from elas.files import new_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder and, beside it, the run that it is imported as."""
    folder = tmp_path_factory.mktemp("source")
    write_model(folder / "m")
    assert run(["import", "hf", "--from", str(folder / "m"), "--out", str(folder / "run")]) == 0
    return folder


def commands(source: Path, target: Path) -> dict[str, list[str]]:
    """An export in either form, without its comparison, one for Megatron-LM, and an import."""
    export = ["export", "hf", "--checkpoint", str(source / "run"), "--no-compare", "--out", str(target), "--form"]
    return {
        "elas": [*export, "elas"],
        "dense": [*export, "dense"],
        "megatron": ["checkpoint", "export", str(source / "run"), str(target)],
        "import": ["import", "hf", "--from", str(source / "m"), "--out", str(target)],
    }


@pytest.mark.parametrize("what", ["elas", "dense", "megatron", "import"])
@pytest.mark.parametrize("size", ["8k", "60k", "120k"])
def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys, what, size):
    """It is full at the weights, at the first of their bytes or later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        command = commands(source, disk / "out")[what]
        assert exit_status(run, command) == 1
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("error:")]
        assert "disk is full" in line and str(disk / "out") in line and "Traceback" not in error
        assert not list(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert run(command) == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.timeout(300)
def test_a_killed_export_leaves_no_target_and_is_repeated(source, tmp_path):
    target = tmp_path / "out"
    command = commands(source, target)["elas"]
    command.remove("--no-compare")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "elas.cli", *command], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "config.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run(commands(source, target)["elas"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_writes_is_left_to_it(source, tmp_path, capsys):
    with new_folder(tmp_path / "out") as other:
        (other / "weights").write_text("of another process")
        assert exit_status(run, commands(source, tmp_path / "out")["elas"]) == 2
        assert "out: another process is writing it" in capsys.readouterr().err
    assert (tmp_path / "out" / "weights").read_text() == "of another process"
