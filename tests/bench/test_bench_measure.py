"""What the benchmarks measure with: turns, saved bytes, peak memory."""

import pytest
import torch

from elas.bench.measure import Memory, SavedBytes, in_turns, rms_error
from elas.bench.show import ratio_table
from elas.console import table


def test_every_variant_takes_its_turn_and_the_start_rotates():
    calls = []
    times = {name: iter(values) for name, values in {"a": (9, 1, 5, 3), "b": (9, 2, 2, 2), "c": (9, 8, 7, 6)}.items()}

    def job(name):
        calls.append(name)
        return (next(times[name]), 0.0)

    medians = in_turns({name: lambda name=name: job(name) for name in times}, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert medians == {"a": (3, 0.0), "b": (2, 0.0), "c": (7, 0.0)}


def test_saved_bytes_count_storages_once_without_parameters():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(16, 8, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.hooks():
        y = x @ weight  # saves x, weight
        (y[:8] * y[8:]).sum()  # two views of y: its storage once
    assert saved.total == x.nbytes + y.nbytes


def test_saved_bytes_inside_a_module_only():
    inner, outer = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    saved = SavedBytes([*inner.parameters(), *outer.parameters()])
    with saved.inside([inner]):
        h = outer(torch.randn(4, 8))
        inner(h)
    assert set(saved.storages) == {h.untyped_storage().data_ptr()}
    inner(torch.randn(4, 8))  # hooks are gone
    assert len(saved.storages) == 1


def test_peak_memory_of_known_allocations():
    before = torch.ones(2**18)
    with Memory(torch.device("cpu")) as memory:
        a = torch.ones(2**20)
        b = a + 1
        del a
        kept = b[:2].clone()
        del b, before
    small = 1024
    assert 2 * 2**22 <= memory.peak <= 2 * 2**22 + small  # a and b at once; what stood before does not count
    assert kept.nbytes <= memory.kept <= kept.nbytes + small


def test_memory_ignores_earlier_measurements():
    def tensors():
        return [torch.ones(256) for _ in range(200)]

    with Memory(torch.device("cpu")):
        earlier = tensors()
    addresses = {tensor.data_ptr() for tensor in earlier}
    del earlier
    before = tensors()
    assert addresses & {tensor.data_ptr() for tensor in before}
    with Memory(torch.device("cpu")) as memory:
        del before
    assert (memory.peak, memory.kept) == (0, 0)


def test_memory_writes_nothing_to_stderr_but_lets_others(capfd):
    with Memory(torch.device("cpu")):
        torch.ones(8)
        import os

        os.write(2, b"a line of somebody else\n")
    assert capfd.readouterr().err == "a line of somebody else\n"


def test_error_of_a_wrong_shape_or_nan_is_infinite():
    one = torch.ones(4)
    assert rms_error(one, one) == 0
    assert rms_error(1.1 * one, one) == pytest.approx(0.1, rel=1e-5)
    assert rms_error(one[:2], one) == rms_error(one * float("nan"), one) == rms_error(None, one) == float("inf")


def test_tables_align():
    lines = table(["name", "n"], [["a", "1"], ["long", "10"]]).splitlines()
    assert lines == ["name   n", "────────", "a      1", "long  10"]
    rows = [{"what": "saved_bytes", "of": "a", "to": "b", "ratio": 0.5, "dtype": "float32"}]
    assert "saved: a ÷ b" in ratio_table(rows, ("dtype",))
