"""The public names: docs/api.md runs as it stands, and `elas.load` opens whatever holds a model."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from support.docs import ROOT, blocks
from support.folders import write_model

import elas
from elas.cli import run
from elas.errors import UserError

PAGE = ROOT / "docs" / "api.md"
IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with `exports/60m`, a small model, and `runs/60m`, a run that starts from it."""
    folder = tmp_path_factory.mktemp("api")
    write_model(folder / "exports" / "60m")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["import", "hf", "--from", "exports/60m", "--out", "runs/60m"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(here, monkeypatch):
    monkeypatch.chdir(here)


def found(name: str) -> bool:
    """Whether a dotted name leads to a module or an attribute."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_every_name_of_the_page_exists():
    names = set(re.findall(r"`(elas(?:\.\w+)+)", PAGE.read_text()))
    assert len(names) > 10
    assert [name for name in sorted(names) if not found(name)] == []
    assert not found("elas.nn.Nothing") and not found("elas.nothing")


def test_blocks_of_the_page_run(monkeypatch):
    shown = [block for block in blocks(PAGE) if not block.not_run]
    assert len(shown) >= 6 and {block.kind for block in shown} == {"python"}
    for block in shown:
        exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


def test_names_of_the_package_are_importable():
    assert elas.__all__ == ["__version__", "load", "load_tokenizer", "prepare"]
    assert all(hasattr(elas, name) for name in elas.__all__)


def test_importing_the_package_imports_no_torch():
    code = "import sys, elas; print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("path", ["exports/60m", "runs/60m", "runs/60m/checkpoints/step_00000000"])
def test_load_opens_folders_runs_and_checkpoints_alike(path):
    model, wanted = elas.load(path), elas.load("exports/60m")
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=0, atol=1e-6)
    assert elas.load_tokenizer(path).encode("the cat") == elas.load_tokenizer("exports/60m").encode("the cat")


def test_load_takes_a_dtype():
    assert elas.load("runs/60m", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_names_a_skipped_checkpoint(here, tmp_path):
    import shutil

    shutil.copytree(here / "runs" / "60m", tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/step_00000000", tmp_path / "run/checkpoints/step_00000005")
    with pytest.warns(UserWarning, match="skipped .*step_00000005"):
        elas.load(tmp_path / "run")


@pytest.mark.parametrize("path, why", [("nowhere", "no such"), ("exports", "manifest"), ("", "manifest")])
def test_what_cannot_be_opened_is_one_line(path, why):
    with pytest.raises(UserError) as raised:
        elas.load(path)
    text = str(raised.value)
    assert why in text and "give a run's folder" in text and "\n" not in text
