"""`pytest --device`: what it selects, hides and skips, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import device
from support.device import OnDevice

ROOT = Path(__file__).parents[2]


def collect(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def test_without_a_gpu_cuda_is_refused_in_one_line_with_status_2():
    done = collect("--device", "cuda", "tests/gpu")
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(said) == 1 and "no CUDA device" in said[0]


def test_make_test_gpu_says_so_too():
    done = subprocess.run(
        ["make", "test-gpu", f"BIN={Path(sys.executable).parent}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout + done.stderr


def test_on_a_cpu_tests_of_the_gpu_are_skipped_with_the_reason():
    done = collect("tests/gpu", "-rs")
    assert done.returncode == 0
    assert "skipped" not in done.stdout or "pytest --device cuda" in done.stdout
    assert "passed" not in done.stdout


class Item:
    """What `select` asks of a test."""

    def __init__(self, path, *markers):
        self.path, self.own, self.added = Path(path), {mark.name: mark for mark in markers}, []

    def get_closest_marker(self, name):
        return self.own.get(name)

    def add_marker(self, mark):
        self.added.append(mark)


class Config:
    """A configuration with one option, and a hook that keeps what is deselected."""

    def __init__(self, chosen):
        self.chosen, self.deselected, self.hook = chosen, [], self

    def getoption(self, name):
        return self.chosen

    def pytest_deselected(self, items):
        self.deselected += items


def test_on_a_gpu_shared_tests_and_those_of_the_gpu_run():
    items = [
        Item("tests/gpu/test_a.py"),
        Item("tests/nn/test_b.py", pytest.mark.any_device.mark),
        Item("tests/unit/test_c.py"),
        Item("tests/unit/test_d.py", pytest.mark.gpu_only.mark),
    ]
    config, kept = Config("cuda"), list(items)
    device.select(config, kept)
    assert kept == [items[0], items[1], items[3]] and config.deselected == [items[2]]
    config, kept = Config("cpu"), list(items)
    device.select(config, kept)
    assert kept == items and [bool(item.added) for item in items] == [True, False, False, True]


def test_more_ranks_than_gpus_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.needs_gpus(2)
    with pytest.raises(pytest.skip.Exception, match="4 ranks, 2 GPUs here: NCCL takes one rank for each GPU"):
        device.needs_gpus(4)


def test_tensors_are_made_on_the_device_with_the_same_values():
    """On `meta`, the one other device that is everywhere; values where a generator draws them."""
    with OnDevice(torch.device("meta")):
        assert torch.ones(2).is_meta and torch.tensor([1.0]).is_meta and torch.nn.Linear(2, 3).weight.is_meta
        assert not torch.ones(2, device="cpu").is_meta
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(1), requires_grad=True)
        assert drawn.is_meta and drawn.requires_grad
    assert not torch.ones(2).is_meta
    with OnDevice(torch.device("cpu")):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_only_marked_tests_make_tensors_there():
    assert device.makes_tensors(Item("a", pytest.mark.any_device.mark))
    assert not device.makes_tensors(Item("a", pytest.mark.any_device("processes").mark))
    assert not device.makes_tensors(Item("a"))
