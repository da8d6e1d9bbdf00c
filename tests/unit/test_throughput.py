"""Figures of speed are not mixed, an unknown device has no share of a peak, and goodput survives restarts."""

import time

import pytest

from elas import accelerator
from elas.config import load_config
from elas.plan.flops import hardware_flops, model_flops, twin_flops
from elas.plan.hardware import peak_of
from elas.train import throughput
from elas.train.throughput import Goodput, Throughput


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU of a name."""

    def named(name: str) -> None:
        monkeypatch.setattr(accelerator, "has_cuda", lambda: True)
        monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: name)

    return named


def test_without_a_known_peak_there_is_no_share(gpu):
    config = load_config("60m", {"train.dtype": "bfloat16"})
    on_cpu = Throughput(config, 4).of(1000.0, 10)
    gpu("NVIDIA Unheard-of 9000")
    unknown = Throughput(config, 4).of(1000.0, 10)
    gpu("NVIDIA H100 80GB HBM3")
    fp32 = Throughput(load_config("60m", {"train.dtype": "float32"}), 4).of(1000.0, 10)
    for row in (on_cpu, unknown, fp32):
        assert row["mfu"] is row["hfu"] is row["peak_tflops"] is None
        assert row["tflops_per_rank"] == pytest.approx(250 * model_flops(config).training / 1e12)


def test_three_figures(gpu):
    gpu("NVIDIA H100 80GB HBM3")
    config = load_config("350m", {"train.dtype": "bfloat16"})
    row = Throughput(config, 8).of(8e5, 10**9)
    assert row["peak_tflops"] == 989  # the dense one, not 1,979 of the sparse
    assert row["tokens_per_s_per_rank"] == 1e5
    assert row["mfu"] == pytest.approx(1e5 * model_flops(config).training / 989e12)
    assert row["hfu"] == pytest.approx(1e5 * hardware_flops(config) / 989e12)
    assert row["dense_equivalent_tflops_per_rank"] == pytest.approx(1e5 * twin_flops(config).training / 1e12)
    assert row["mfu"] < row["hfu"] < row["dense_equivalent_tflops_per_rank"] / 989
    assert row["flops"] == pytest.approx(1e9 * model_flops(config).training)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None),
        ("NVIDIA A1000", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peaks_by_name(name, tflops):
    found = peak_of(name)
    assert (found and found.flops / 1e12) == tflops


def test_goodput_counts_what_the_checkpoint_keeps(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(throughput, "_process_start", lambda: now)
    monkeypatch.setattr(time, "time", lambda: now)
    first = Goodput(None)
    now = 1010.0
    first.started()
    first.add("train", 60.0)
    first.add("data", 6.0)
    first.add("validation", 10.0)
    first.add("save", 10.0)
    now = 1100.0
    saved = first.facts()
    columns = first.columns()
    assert columns["goodput"] == pytest.approx(0.6)
    assert columns["data_share"] == pytest.approx(0.1)
    assert columns["lost_s"] == pytest.approx(10.0)
    first.add("train", 50.0)  # lost in a crash
    now = 1200.0
    second = Goodput(saved)
    now = 1220.0
    second.started()
    second.add("train", 20.0)
    now = 1300.0
    columns = second.columns()
    assert columns["goodput"] == pytest.approx(80 / 300)
    assert columns["start_s"] == 30.0 and columns["save_s"] == 10.0
    assert columns["lost_s"] == pytest.approx(300 - 80 - 30 - 20)


def test_a_rollback_loses_what_came_after_its_checkpoint():
    goodput = Goodput(None)
    goodput.add("train", 5.0)
    kept = goodput.facts()
    goodput.add("train", 7.0)
    goodput.add("validation", 2.0)
    goodput.back_to(kept)
    facts = goodput.facts()
    assert facts["train"] == 5.0 and facts["validation"] == 2.0


def test_a_checkpoint_without_the_record_starts_one():
    assert Goodput(None).columns()["goodput"] == 0.0


def test_memory_is_this_process():
    assert 10**7 < throughput.memory()["memory_peak_bytes"] < 10**12
