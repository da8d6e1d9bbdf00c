"""Hardware files, predictions with measured rates, the comparison of `elas plan --check`, and mistakes in one line."""

import json
import time

import pytest
from support.plan_check_cases import made_up

from elas import cli
from elas.command import exit_status
from elas.config import load_config
from elas.config.deepspeed import choose_zero_stage
from elas.errors import UserError
from elas.plan.flops import hardware_flops
from elas.plan.hardware import MACHINES, measured_machine
from elas.plan.memory import estimate
from elas.plan.rates import assumed, measured_from, read_measured
from elas.plan.search import best
from elas.plan.step_time import step_time
from elas.plan.traffic import traffic
from elas.plan_check.components import Component

SHAPE = {"model.num_layers": 4, "train.micro_batch_size": 4, "train.global_batch_size": 16, "train.dtype": "float32"}


def predicted(world: int, scale: float = 1.0, facts: dict | None = None, **sizes):
    config = load_config("60m", {**SHAPE, **{f"parallel.{key}": value for key, value in sizes.items()}})
    choose_zero_stage(config, world)
    machine = measured_machine(measured_from(facts or made_up(scale)))
    return step_time(config, world, machine, traffic(config, world))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = exit_status(cli.run, ["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_hardware_file_is_read_as_it_was_written(tmp_path):
    measured = measured_from(made_up())
    (tmp_path / "h.json").write_text(json.dumps(measured.to_dict()))
    assert read_measured(tmp_path / "h.json") == measured


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("busy", {}),
        ("ranks", 3),
        ("links", {}),
        ("memory", -1),
        ("busy", {"1": {"float32": {"head": 1e9}}}),
        ("extra", 1),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, key, value):
    (tmp_path / "h.json").write_text(json.dumps({**made_up(), key: value}))
    with pytest.raises(UserError, match="not a hardware file"):
        read_measured(tmp_path / "h.json")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "fast", None])
def test_a_rate_must_be_a_number_above_zero(value):
    facts = made_up()
    facts["busy"]["2"] = {"float32": {**facts["busy"]["2"]["float32"], "head": value}}
    with pytest.raises((ValueError, TypeError)):
        measured_from(facts)


def test_twice_the_rates_are_half_the_time():
    """Every term is work over a rate: products, memory, each link, the update and Python."""
    for world, sizes in ((1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"zero": 2}), (4, {"tensor": 2})):
        slow, fast = predicted(world, 1.0, **sizes), predicted(world, 2.0, **sizes)
        assert fast.total == pytest.approx(slow.total / 2, rel=1e-9)
        assert slow.products > 0 and slow.update > 0 and slow.host > 0
        assert (slow.tensor > 0) == ("tensor" in sizes) and (slow.pipeline > 0) == ("pipeline" in sizes)


def test_ranks_that_share_cores_take_turns():
    two, four = (predicted(world, tensor=2, zero=1) for world in (2, 4))
    assert four.products == pytest.approx(two.products, rel=1e-9)  # half of the samples each, twice the time


def test_a_rank_alone_has_the_rates_of_one():
    facts = made_up()
    both = facts["busy"]["1"]
    facts["busy"] = {**facts["busy"], "1": {dtype: {**one, "head": 70e9} for dtype, one in both.items()}}
    assert predicted(1, facts=facts).products < predicted(1).products
    assert predicted(2, facts=facts, zero=0).products == predicted(2, zero=0).products


def test_rates_between_measured_ranks():
    rates = assumed(1e12, 1e11, 1e11, "bfloat16")
    table = {64: 10.0, 256: 40.0}
    assert rates.of_rank(table, 128) == pytest.approx(20.0)
    assert rates.of_rank(table, 64) == 10.0 and rates.of_rank(table, 16) == 10.0 and rates.of_rank(table, 999) == 40.0


def test_the_slowest_stage_sets_the_pace():
    """The last stage has the head: two stages take longer than half of one, and more with fewer micro-batches."""
    one, two = predicted(1), predicted(2, pipeline=2)
    assert one.products / 2 < two.products < one.products and two.bubble > 0 == one.bubble


def test_replicated_factors_count_on_every_rank():
    """Without sequence parallelism each of two ranks computes the products of factors on the hidden side."""
    alone, split, sequence = (
        hardware_flops(load_config("60m", {"parallel.tensor": t, "parallel.sequence": s}))
        for t, s in ((1, False), (2, False), (2, True))
    )
    h, r, layers = 512, 128, 8
    assert sequence == alone and split - alone == 3 * 2 * layers * 6 * r * h


def test_the_head_keeps_a_second_gradient_with_several_micro_batches():
    one, two = (estimate(load_config("60m", {**SHAPE, "train.global_batch_size": n}), 1).head for n in (4, 8))
    assert two - one == 4 * 32128 * 512


def test_what_must_agree():
    assert Component("parameters", "", 10, 10, 0.0).agrees and not Component("parameters", "", 10, 11, 0.0).agrees
    assert Component("kept", "B", 100.9, 100, 0.01).agrees and not Component("kept", "B", 101.1, 100, 0.01).agrees
    assert Component("sent", "B", 0, 300, 1e-3, 300).agrees and not Component("sent", "B", 0, 301, 1e-3, 300).agrees
    assert Component("step", "s", 1, 9).agrees and Component("head", "B", 1, None, 0.01).agrees
    assert Component("step", "s", 1.2, 1.0).off == pytest.approx(0.2)


def test_this_machine(capsys, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps(made_up()))
    arguments = ["--preset", "60m", "--hardware", "this-machine", "--hardware-file", str(path), "--gpus", "2"]
    status, out, _ = run(capsys, *arguments, "--json", f"{tmp_path}/f.json")
    assert status == 0 and "measured on made up" in out and "assumed" not in out
    facts = json.loads((tmp_path / "f.json").read_text())
    assert facts["efficiency"] is None and facts["measured"]["ranks"] == 2
    status, out, _ = run(capsys, "--preset", "60m", "--gpus", "8")
    assert status == 0 and "assumed shares" in out and "measured on" not in out


def test_the_head_of_a_plan_names_batch_tokens_and_full_rank(capsys, tmp_path):
    """What is low rank has fewer parameters than its name says."""
    status, out, _ = run(capsys, "--config", "7b", "--gpus", "8", "--json", f"{tmp_path}/f.json")
    head = out.splitlines()
    assert status == 0 and "2,687.8 M parameters (low rank; at full rank 6,739.5 M), bfloat16" in head[0]
    assert head[1].startswith("global batch 512 × 256 tokens = 131,072 tokens a step; 8 × h100, 80 GB each")
    assert "layouts divide the model, the batch and the GPUs; " in head[2]
    assert head[2].endswith("of them fit into memory, that is into 90% of a GPU's 80 GB less 1.5 GB for CUDA and NCCL")
    facts = json.loads((tmp_path / "f.json").read_text())
    assert (facts["global_batch_size"], facts["tokens_per_step"]) == (512, 131_072)
    assert facts["full_rank_parameters"] > 2 * facts["parameters"]
    assert "low rank" not in run(capsys, "--config", "60m-full", "--gpus", "8")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "60m", "--hardware", "this-machine"], "run `elas plan --measure` first"),
        (["--check", "60m"], "run `elas plan --measure` first"),
        (["--check", "60m", "--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--check", "60m", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--check", "60m", "--ranks", "3", "--parallel.tensor", "2"], "parallel.tensor"),
        (["--check", "nowhere.yaml"], "nowhere.yaml"),
        (["--check", "60m", "--model.hiden_size", "3"], "did you mean model.hidden_size"),
        (["--check", "60m", "--hardware-file", "GPU"], "rates of cuda"),
        (["--check", "7b", "--hardware-file", "CPU", "--ranks", "2"], "are free; give a smaller"),
        (["--config", "60m", "--hardware-file", "CPU"], "only with --hardware this-machine"),
        (["--config", "60m", "--hardware", "this-machine", "--hardware-file", "GPU", "--gpus", "4"], "2 were measured"),
        (["--measure", "--ranks", "4096"], "--ranks 4096: rates are those of busy"),
        (["--measure", "--hardware-file", "/proc/x/y"], "--hardware-file /proc/x/y: cannot be written"),
        (["--measure", "--check", "60m"], "elas plan --measure: unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for device in ("cpu", "cuda"):
        (tmp_path / device).write_text(json.dumps({**made_up(), "device": device}))
    files = {"CPU": str(tmp_path / "cpu"), "GPU": str(tmp_path / "cuda")}
    status, _, errors = run(capsys, *(files.get(word, word) for word in arguments))
    assert status == 2 and message in errors and errors.count("\n") == 1


def test_a_trillion_parameters_on_131072_gpus_in_seconds():
    shape = {"model.hidden_size": 25600, "model.num_layers": 128, "model.num_attention_heads": 160}
    shape |= {"model.ffn_hidden_size": 102400, "model.seq_length": 2048, "train.global_batch_size": 131072}
    shape |= {"train.steps": 5000, "schedule.warmup_steps": 100}
    begun = time.perf_counter()
    low = best(load_config("7b", {**shape, "low_rank.rank": 6400}), 131072, MACHINES["h100"])
    full = best(load_config("7b", {**shape, "low_rank.kind": "none"}), 131072, MACHINES["h100"])
    assert low is not None and low.fits and full is not None and full.fits
    assert low.tokens_per_s > full.tokens_per_s
    assert time.perf_counter() - begun < 60  # about two seconds


def test_a_rule_that_every_layout_breaks_is_named(capsys):
    status, _, errors = run(capsys, "--preset", "7b", "--gpus", "64", "--train.global_batch_size", "131072")
    assert status == 2 and "train.steps=150000" in errors and errors.count("\n") == 1
