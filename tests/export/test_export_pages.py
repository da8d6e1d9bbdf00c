"""The commands of docs/export.md and docs/generate.md run as they stand there."""

import shlex
from pathlib import Path

import pytest
from support.folders import write_model

from elas.cli import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_rank")
def test_commands_of_the_pages_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", sparsity="none")
    assert run(["import", "hf", "--from", "m", "--out", "runs/60m"]) == 0
    Path("book.txt").write_text("the cat sat on the mat. " * 20)
    Path("prompts.txt").write_text("the cat\na dog\n")
    for page, count in (("export.md", 4), ("generate.md", 3)):
        block = (ROOT / "docs" / page).read_text().split("```bash\n")[1].split("```")[0]
        commands = [shlex.split(line, comments=True) for line in block.splitlines()]
        assert len(commands) == count
        for command in commands:
            assert command[0] == "elas" and run(command[1:]) == 0, command
    assert Path("exports/60m/modeling_elas.py").is_file()
    assert Path("exports/60m-dense/config.json").is_file() and Path("out.json").is_file()
