"""Killed, out of memory, out of disk, on Ray: the same command goes on, and its files are the same to the last byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elas.data_prep.executors import finished_tasks

TEXTS = [f"document {i} of many: " + "some words and more, " * (i % 50) for i in range(3000)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in TEXTS[part::3]]
        lines.insert(700, "{broken")
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(inputs, tokenizer, folder, *more) -> list[str]:
    where = f"--output {folder}/train --valid-output {folder}/valid --valid-fraction 0.1 --task-bytes 60000"
    what = f"prep tokenize --input {inputs} --tokenizer {tokenizer} {where} --deduplicate --json {folder}.json"
    return [sys.executable, "-m", "elas.cli", *what.split(), *more]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def undisturbed(inputs, tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = run(inputs, tokenizer_folder, folder, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return folder


def same(folder: Path, other: Path) -> bool:
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in other.iterdir())
    return all((other / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_skipped_lines_are_listed_with_their_numbers(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "train.skipped.jsonl").read_text().splitlines()]
    assert rows == [{"file": f"{part}.jsonl", "line": 701, "reason": "malformed JSON"} for part in range(3)]


def test_killed_at_random_and_started_again(inputs, tokenizer_folder, undisturbed, tmp_path):
    moments = random.Random(5)
    kills = 0
    for workers in (2, 1, 2):
        process = subprocess.Popen(
            command(inputs, tokenizer_folder, tmp_path / "out", "--workers", str(workers)),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        work = tmp_path / "out" / "train.work"
        before = len(finished_tasks(work))
        target = before + moments.randrange(1, 5)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(finished_tasks(work)) < target:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3 and not (tmp_path / "out" / "train.bin").exists()
    done = run(inputs, tokenizer_folder, tmp_path / "out", "--workers", "2")
    assert done.returncode == 0, done.stderr
    facts = json.loads(Path(f"{tmp_path}/out.json").read_text())
    assert facts["tasks_done_before"] >= 3
    assert same(undisturbed, tmp_path / "out")


def test_a_killed_worker_is_told_and_its_siblings_end(inputs, tokenizer_folder, undisturbed, tmp_path):
    process = subprocess.Popen(
        command(inputs, tokenizer_folder, tmp_path / "out", "--workers", "2"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(workers := children(process.pid)) < 2 or not finished_tasks(tmp_path / "out" / "train.work"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker was killed" in error and len(error.strip().splitlines()) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert run(inputs, tokenizer_folder, tmp_path / "out").returncode == 0
    assert same(undisturbed, tmp_path / "out")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_full_disk_is_told_and_the_work_goes_on_after(inputs, tokenizer_folder, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        done = run(inputs, tokenizer_folder, disk / "out", "--workers", "2")
        assert done.returncode == 1, done.stderr
        assert "no space left on the disk" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert finished_tasks(disk / "out" / "train.work")
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        done = run(inputs, tokenizer_folder, disk / "out")
        assert done.returncode == 0, done.stderr
        facts = json.loads((disk / "out.json").read_text())
        assert facts["tasks_done_before"] > 0
        assert same(undisturbed, disk / "out")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_inputs_that_change_under_unfinished_work_are_refused(inputs, tokenizer_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(inputs, copy)
    process = subprocess.Popen(
        command(copy, tokenizer_folder, tmp_path / "out", "--workers", "1"), stderr=subprocess.DEVNULL
    )
    while not finished_tasks(tmp_path / "out" / "train.work"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    with (copy / "1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    done = run(copy, tokenizer_folder, tmp_path / "out")
    assert done.returncode == 2 and "unfinished work here has other files" in done.stderr
    done = run(copy, tokenizer_folder, tmp_path / "out", "--overwrite")
    assert done.returncode == 0, done.stderr


def test_ray_runs_the_tasks(inputs, tokenizer_folder, undisturbed, tmp_path):
    done = run(inputs, tokenizer_folder, tmp_path / "out", "--executor", "ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert same(undisturbed, tmp_path / "out")
