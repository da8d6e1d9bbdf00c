"""Whatever happens to a file of a checkpoint is found, and the one before it taken; what a file holds is never run."""

import json
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.corpora import SMALL, write_corpus
from support.training_processes import finish, rows, start

from elas.checkpoint.choose import find_checkpoint
from elas.checkpoint.folder import MANIFEST, SEAL
from elas.checkpoint.resume import first_intact
from elas.checkpoint.storage import INDEX, read, read_index
from elas.cli import run
from elas.command import exit_status
from elas.config import load_config
from elas.errors import ConfigError
from elas.extensions import prebuild_deepspeed

pytestmark = pytest.mark.timeout(300)
FILES = ["__0_0.distcp", "__1_0.distcp", INDEX, MANIFEST, SEAL]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return {**SMALL, "data.train": corpus, "data.split": "90,10,0", "parallel.zero": 2, "train.steps": 6}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    finish(start({**settings, "train.run_dir": folder}))
    assert sorted(path.name for path in (folder / "checkpoints" / "step_00000006").iterdir()) == sorted(FILES)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(seed: int):
    def change(path: Path) -> None:
        data, chosen = bytearray(path.read_bytes()), random.Random(f"{path.name} {seed}")
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)

    change.__name__ = f"flip{seed}"
    return change


@pytest.mark.parametrize("damage", [cut, Path.unlink, *map(flip, range(8))], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file(one_rank, settings, trained, tmp_path, capsys, name, damage):
    folder = shutil.copytree(trained, tmp_path / "run")
    newest = folder / "checkpoints" / "step_00000006"
    damage(newest / name)
    report = tmp_path / "verify.json"
    assert exit_status(run, ["checkpoint", "verify", str(folder), "--json", str(report)]) == 1
    facts = json.loads(report.read_text())
    assert not facts["ok"] and [bad["checkpoint"] for bad in facts["bad"]] == [str(newest)]
    assert name in facts["bad"][0]["why"] or name in (MANIFEST, SEAL)
    config = load_config(None, {**settings, "train.run_dir": str(folder)})
    found = first_intact(find_checkpoint(config), config)
    assert found.step == 3 and len(found.passed_over) == 1 and str(newest) in found.passed_over[0]
    config.checkpoint.resume = str(newest)
    with pytest.raises(ConfigError, match="give the folder of an intact checkpoint"):
        first_intact(find_checkpoint(config), config)


def test_warnings_are_of_the_checkpoint_that_is_resumed(settings, trained, tmp_path):
    """The newest one has the right sizes, but not the right bytes: the lines before its check must not speak of it."""
    folder = shutil.copytree(trained, tmp_path / "run")
    flip(0)(folder / "checkpoints" / "step_00000006" / "__1_0.distcp")
    output = finish(start({**settings, "train.run_dir": folder, "train.steps": 9, "log.every_steps": 50}))
    (line,) = [line for line in output.splitlines() if line.startswith("warning: log.every_steps=50")]
    assert "no metrics between the first step and the last" in line and "__1_0.distcp is damaged" in output
    places = [line for line in output.splitlines() if "where it resumes" in line]
    assert places and all("step 3, where it resumes" in line for line in places), output


def test_whole_ones_verify_and_are_listed(trained, capsys):
    assert exit_status(run, ["checkpoint", "verify", str(trained)]) == 0
    assert exit_status(run, ["checkpoint", "list", str(trained)]) == 0
    assert "DP 2, ZeRO 2" in capsys.readouterr().out
    assert exit_status(run, ["checkpoint", "info", str(trained)]) == 0
    assert "step              6" in capsys.readouterr().out
    assert exit_status(run, ["checkpoint", "verify", str(trained / "nowhere")]) == 2


@pytest.mark.parametrize("module", (b"pathlib", b"pathlib._local"), ids=("to 3.12", "from 3.13"))
def test_an_index_of_every_python_is_read(trained, tmp_path, module):
    folder = shutil.copytree(trained / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    index = pickle.dumps(pickle.loads((folder / INDEX).read_bytes()), protocol=2)  # names modules in plain text
    index = index.replace(b"cpathlib._local\nPosixPath", b"cpathlib\nPosixPath")
    assert index.count(b"cpathlib\nPosixPath") == 1
    (folder / INDEX).write_bytes(index.replace(b"cpathlib\nPosixPath", b"c%s\nPosixPath" % module))
    assert read_index(folder).state_dict_metadata


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def test_a_file_that_would_run_something_is_refused_unrun(trained, tmp_path):
    folder = shutil.copytree(trained / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()  # so it is evil indeed
    proof.unlink()
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(pickle.UnpicklingError, match="does not belong to an index"):
        read_index(folder)
    (folder / INDEX).write_bytes(index)
    metadata = read_index(folder)
    name = next(iter(metadata.state_dict_metadata))
    torch.save(Evil(proof), tmp_path / "evil.pt")
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        for where in metadata.storage_data.values():
            if where.relative_path == file.name:
                evil = (tmp_path / "evil.pt").read_bytes().ljust(where.length, b"\0")[: where.length]
                content[where.offset : where.offset + where.length] = evil
        file.write_bytes(content)
    with pytest.raises(Exception, match=r"[Ww]eights|unpickl|archive|invalid"):
        read(folder, {name: torch.zeros(metadata.state_dict_metadata[name].size)})
    assert not proof.exists()


@pytest.mark.parametrize("save_beside", [False, True])
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(settings, tmp_path, save_beside):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        settings = {**settings, "train.run_dir": disk / "run", "checkpoint.keep": 0, "train.steps": 30}
        settings["checkpoint.async_save"] = save_beside
        ranks = start(settings)
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, 1], outputs
        (line,) = [line for line in outputs[0].splitlines() if line.startswith("error:")]
        assert "could not be written" in line and "No space left" in line and "the last intact one is" in line
        assert "Traceback" not in outputs[0]
        assert exit_status(run, ["checkpoint", "verify", str(disk / "run")]) == 0
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert "resumed from" in finish(start(settings))
        assert [row["step"] for row in rows(disk / "run")] == list(range(1, 31))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
