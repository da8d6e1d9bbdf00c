"""Which implementation runs: `auto` takes the best and says so once; a name that cannot be had is refused."""

import logging

import pytest
import torch

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Implementation, Relu24Options, ffn_core, implementations, register, registry, select

CPU = torch.device("cpu")
COMPRESSED = Relu24Options(ffn_memory="compressed")
MEMORIES = ("eager", "compressed", "fused")


@pytest.fixture
def added():
    """A function that registers an implementation for this test only, beside the plain ones alone."""
    before = [one for memory in MEMORIES for one in implementations(memory)]
    for one in before:
        if one.name not in ("torch", "reference"):
            registry.unregister(one.name, one.ffn_memory)

    def add(name, priority, reason=None, ffn_memory="compressed", unsupported=None, fits=lambda *_: None):
        def core(u, m_up, n_down, options):
            return u.new_full((1,), priority)

        supports = lambda options: unsupported  # noqa: E731
        available = lambda device, dtype: reason  # noqa: E731
        register(Implementation(name, ffn_memory, core, available, priority, supports=supports, fits=fits))

    yield add
    for memory in MEMORIES:
        for one in implementations(memory):
            registry.unregister(one.name, memory)
    for one in before:
        register(one)


def test_the_plain_implementations_are_registered():
    assert [one.name for one in implementations("eager")] == ["reference", "split"]
    for memory in ("compressed", "fused"):
        assert implementations(memory)[-1].name == "torch"


def test_auto_runs_the_available_one_of_highest_priority(added):
    added("best", 30, reason="no such device here")
    added("good", 20)
    added("fair", 10)
    assert select(COMPRESSED, CPU, torch.float32).name == "good"
    args = torch.ones(2, 3), torch.ones(4, 3), torch.ones(5, 4)
    assert ffn_core(*args, COMPRESSED).item() == 20
    assert ffn_core(*args, COMPRESSED, implementation="fair").item() == 10
    assert ffn_core(*args, COMPRESSED, implementation="torch").shape == (2, 5)


def test_auto_says_once_what_it_chose_and_why(added, caplog):
    """As a warning, which Python shows by default, where PyTorch's own operations stand in for a kernel."""
    added("best", 30, reason="no such device, said once")
    with caplog.at_level(logging.INFO, "elas.kernels"):
        for _ in range(3):
            select(COMPRESSED, CPU, torch.float32)
        assert len(caplog.records) == 1
        line = caplog.records[0].getMessage()
        assert "torch" in line
        assert "best: no such device, said once" in line
        select(COMPRESSED, CPU, torch.bfloat16)
        added("good", 20)
        select(COMPRESSED, CPU, torch.float32)
        registry.unregister("reference", "eager")
        added("first and only", registry.PLAIN, ffn_memory="eager")
        select(Relu24Options(ffn_memory="eager"), CPU, torch.float32)  # nothing was passed over
        assert [one.levelno for one in caplog.records] == [logging.WARNING, logging.WARNING, logging.INFO, logging.INFO]


def test_what_a_caller_shows_itself_is_not_logged_again(added, caplog):
    added("best", 30, reason="no such device, shown by the caller")
    one, why = registry.choose(COMPRESSED, CPU, torch.float32)
    assert not registry.announced(one, why, CPU, torch.float32)
    with caplog.at_level(logging.INFO, "elas.kernels"):
        assert select(COMPRESSED, CPU, torch.float32) is one
    assert caplog.records == []


def test_widths_without_a_kernel_are_refused_or_passed_over(added):
    """A narrow kernel never runs wide widths by another way in silence: by name an error, by `auto` another choice."""
    added("narrow", 30, fits=lambda widths, device, dtype: "too wide" if max(widths.r_in, widths.r_out) > 4 else None)
    for r_in, r_out, runs in ((3, 4, True), (5, 3, False), (3, 5, False)):
        args = torch.ones(2, r_in), torch.ones(8, r_in), torch.ones(r_out, 8)
        chosen, why = registry.choose(COMPRESSED, CPU, torch.float32, "auto", registry.Widths(r_in, 8, r_out))
        assert chosen.name == ("narrow" if runs else "torch") and ("too wide" in why) == (not runs)
        if runs:
            assert ffn_core(*args, COMPRESSED, "narrow").item() == 30
        else:
            assert ffn_core(*args, COMPRESSED).shape == (2, r_out)
            with pytest.raises(ConfigError, match=r"^implementation='narrow': not available: too wide; use auto"):
                ffn_core(*args, COMPRESSED, "narrow")


def test_the_machine_is_asked_once_a_device_and_dtype():
    asked = []
    one = Implementation("asking", "compressed", None, lambda *where: asked.append(where), 50)
    register(one)
    try:
        for _ in range(3):
            assert select(COMPRESSED, CPU, torch.float32) is one
        assert asked == [(CPU, torch.float32)]
    finally:
        registry.unregister("asking", "compressed")


def test_explicit_names_that_cannot_run_are_refused_with_reasons(added):
    added("best", 30, reason="no such device here")
    with pytest.raises(ConfigError, match=r"^implementation='best': .*no such device here"):
        select(COMPRESSED, CPU, torch.float32, "best")


def test_options_an_implementation_does_not_support_pass_it_over(added):
    added("partial", 30, unsupported="ste is not written yet")
    assert select(COMPRESSED, CPU, torch.float32).name == "torch"
    with pytest.raises(ConfigError, match="ste is not written yet"):
        select(COMPRESSED, CPU, torch.float32, "partial")


@pytest.mark.parametrize("name", ("nonesuch", "reference"))
def test_unknown_names_are_refused_with_the_known_ones(name):
    match = rf"^implementation='{name}': .*ffn_memory=compressed; use auto \|.* torch"
    with pytest.raises(ConfigError, match=match):
        select(COMPRESSED, CPU, torch.float32, name)


def test_a_fused_implementation_just_joins(added):
    added("new", 99, ffn_memory="fused")
    options = Relu24Options(ffn_memory="fused")
    assert ffn_core(torch.ones(2, 3), torch.ones(4, 3), torch.ones(5, 4), options).item() == 99
    assert select(COMPRESSED, CPU, torch.float32).ffn_memory == "compressed"


def test_when_none_can_run_every_reason_is_given(added):
    registry.unregister("torch", "fused")
    added("one", 2, reason="first reason", ffn_memory="fused")
    added("two", 1, reason="second reason", ffn_memory="fused")
    with pytest.raises(ConfigError, match=r"one: first reason; two: second reason"):
        select(Relu24Options(ffn_memory="fused"), CPU, torch.float32)


def test_a_name_is_taken_once(added):
    with pytest.raises(RuntimeError, match="registered twice"):
        added("torch", 5)
