"""What is wrong around a command, not in its input, is one line too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("tune", "bench ffn", "bench step", "build", "quickstart --steps 1")


def elas(arguments, folder, first=()):
    """Run `elas` in `folder`; its status and stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, first), str(ROOT)])}
    command = [sys.executable, "-m", "elas.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("raises", ["OSError('libcudart.so.13: cannot open')", "ImportError('an old one')"])
def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path, command, raises):
    (tmp_path / "first" / "torch").mkdir(parents=True)
    (tmp_path / "first" / "torch" / "__init__.py").write_text(f"raise {raises}")
    status, printed = elas(command.split(), tmp_path, [tmp_path / "first"])
    lines = [line for line in printed.splitlines() if not line.startswith("loading ")]
    assert status == 1 and len(lines) == 1, printed
    assert lines[0].startswith("error: torch cannot be imported: ") and lines[0].endswith("; see elas doctor")


def test_another_package_that_fails_keeps_its_traceback(tmp_path):
    (tmp_path / "first" / "numpy").mkdir(parents=True)
    (tmp_path / "first" / "numpy" / "__init__.py").write_text("raise ImportError('of another kind')")
    status, printed = elas(["prep", "info", "x"], tmp_path, [tmp_path / "first"])
    assert status == 1 and "Traceback" in printed and "of another kind" in printed


@pytest.mark.parametrize("command", [["doctor"], ["train", "--config", "quickstart"], ["--version"]])
def test_a_working_folder_that_was_deleted_is_one_line(tmp_path, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'rmdir "{gone}"; exec {sys.executable} -P -m elas.cli {" ".join(command)}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=gone, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: the working folder was deleted; cd to one that exists"
    assert "Traceback" not in done.stderr
