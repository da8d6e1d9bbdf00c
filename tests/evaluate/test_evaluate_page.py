"""The commands of docs/evaluate.md run as they stand there."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elas.evaluate import cli

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_rank")]


@pytest.fixture
def here(trained, llama, tmp_path, monkeypatch):
    """A folder that has what the page names."""
    for folder in ("runs", "exports", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "60m").symlink_to(trained / "run")
    (tmp_path / "exports" / "60m").symlink_to(llama)
    (tmp_path / "tasks").symlink_to(ROOT / "tests" / "evaluate" / "tasks")
    for end in ("bin", "idx", "manifest.json"):
        shutil.copy(trained / f"valid.{end}", tmp_path / "data" / f"c4-valid.{end}")
    (tmp_path / "book.txt").write_text("words 144 of text 1728 é\n" * 9)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(b'{"body": "words 9 of text 27"}\n'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_the_page_run(here):
    from elas import parallel

    block = (ROOT / "docs" / "evaluate.md").read_text().split("```bash\n")[1].split("```")[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 6
    for command in commands:
        if command[:2] == ["elas", "eval"]:
            if "--tasks" in command:
                pytest.importorskip("lm_eval", reason="pip install 'elas[eval]'")
            assert cli.main(command[2:]) == 0, command
            parallel.shut_down()
            continue
        paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        shown = dict(line.split("   ", 1) for line in done.stdout.splitlines() if "   " in line)
        loss = float(next(value for name, value in shown.items() if name.strip() == "loss"))
        assert loss == pytest.approx(json.loads(Path("c4.json").read_text())["loss"], rel=1e-5)
