"""`elas plan`: what it recommends is a configuration that `validate` accepts, and it answers at once."""

import json
import random
import time

import pytest

from elas import cli
from elas.command import exit_status
from elas.config import load_config, presets
from elas.config.rules import validate
from elas.errors import ConfigError
from elas.plan.hardware import MACHINES
from elas.plan.search import best, plans


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    status = exit_status(cli.run, ["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_recommendations_are_valid():
    """Of 200 random presets, numbers of GPUs and machines."""
    draw = random.Random(5)
    recommended = 0
    for _ in range(200):
        config = load_config(draw.choice(presets()))
        gpus, machine = draw.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128, 256, 512]), draw.choice([*MACHINES])
        found = best(config, gpus, MACHINES[machine])
        if found is not None:
            validate(found.config, gpus)
            recommended += 1
    assert recommended > 120


def test_the_best_fits_and_is_the_fastest():
    found = plans(load_config("7b"), 64, MACHINES["a100"])
    fitting = [one for one in found if one.fits]
    assert fitting and found[0] is min(fitting, key=lambda one: one.time.total)
    assert all(one.bytes < MACHINES["a100"].memory for one in fitting)


def test_more_of_what_costs_costs_more():
    """At the same layout without tensor parallelism full rank needs more memory and traffic; fewer GPUs more time."""
    by_layout = {tuple(one.settings.values()): one for one in plans(load_config("1b"), 32, MACHINES["h100"])}
    compared = 0
    for one in plans(load_config("1b-full"), 32, MACHINES["h100"]):
        other = by_layout.get(tuple(one.settings.values()))
        if other is not None and one.config.parallel.tensor == 1:
            assert one.memory.total > other.memory.total and one.traffic.total >= other.traffic.total
            compared += 1
    assert compared > 50
    few, many = (best(load_config("7b"), n, MACHINES["h100"]) for n in (8, 64))
    assert few.time.total > many.time.total


def test_seven_billion_on_256_gpus_in_seconds(capsys, tmp_path):
    begun = time.perf_counter()
    status, out, _ = plan(
        capsys, "--preset", "7b", "--hardware", "h100", "--gpus", "256", "--json", f"{tmp_path}/f.json"
    )
    assert status == 0 and time.perf_counter() - begun < 30  # about half a second
    assert "full rank" in out and "low rank" in out and "assumed shares" in out
    facts = json.loads((tmp_path / "f.json").read_text())
    assert facts["recommended"]["fits"] and facts["layouts"] > 1000
    assert facts["rivals"]["full rank"]["fits"] and facts["rivals"]["low rank"]["fits"]
    assert (
        facts["rows"][0]["fits"]
        and {"tp", "pp", "dp", "zero", "memory_gb", "comm_gb_per_step"} <= facts["rows"][0].keys()
    )
    assert facts["recommended"]["step_s"] == pytest.approx(sum(facts["recommended"]["time"].values()))


def test_the_file_it_writes_is_a_configuration(capsys, tmp_path):
    path = tmp_path / "plan.yaml"
    status, out, _ = plan(
        capsys, "--config", "1b", "--gpus", "64", "--train.dtype", "bfloat16", "--yaml", str(path), "--picture",
        f"{tmp_path}/p.png",
    )  # fmt: skip
    assert status == 0 and f"--config {path}" in out
    validate(load_config(str(path)), 64)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("gpus", "words"), [("64", "--nodes 8 --gpus-per-node 8"), ("12", "--nodes 2 --gpus-per-node 6")]
)
def test_the_launch_line_starts_exactly_these_gpus(capsys, tmp_path, gpus, words):
    batch = ["--train.global_batch_size", "768"]
    status, out, _ = plan(capsys, "--config", "350m", "--gpus", gpus, *batch, "--yaml", f"{tmp_path}/plan.yaml")
    assert status == 0 and words in out


def test_how_many_gpus_meet_a_deadline(capsys, tmp_path):
    found = {}
    for days in ("40d", "10d"):
        path = tmp_path / f"{days}.json"
        status, _, _ = plan(
            capsys, "--config", "1b", "--tokens", "100B", "--deadline", days, "--json", str(path),
            "--train.global_batch_size", "4096",
        )  # fmt: skip
        assert status == 0
        found[days] = json.loads(path.read_text())
        assert found[days]["recommended"]["days"] <= float(days[:-1])
    assert found["10d"]["gpus"] > found["40d"]["gpus"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "1b", "--gpus", "0"], "'0': must be a whole number"),
        (["--config", "1b", "--gpus", "many"], "'many': must be a whole number"),
        (["--config", "1b", "--deadline", "3d"], "--deadline requires --tokens"),
        (["--config", "1b", "--tokens", "lots"], "--tokens 'lots': is no number of tokens"),
        (["--config", "1b", "--tokens", "1T", "--deadline", "soon"], "--deadline 'soon': is no time"),
        (["--config", "1b", "--tokens", "900T", "--deadline", "1h"], "the fastest layout needs"),
        (
            ["--config", "7b", "--tokens", "3B", "--deadline", "12h", "--parallel.pipeline", "64"],
            "--deadline 12h: no layout",
        ),
        (["--config", "60m", "--parallel.tensor", "0"], "parallel.tensor=0: out of range; give 1 or more"),
        (["--config", "60m", "--train.micro_batch_size", "-1"], "train.micro_batch_size=-1: out of range"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "1b", "--yaml", "/nonexistent/x.yaml"], "--yaml /nonexistent/x.yaml: "),
        (["--config", "1b", "--picture", "/nonexistent/x.png"], "--picture /nonexistent/x.png: "),
        (["--config", "1b", "--model.hiden_size", "3"], "did you mean model.hidden_size"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    status, _, errors = plan(capsys, *arguments)
    assert status == 2 and message in errors and errors.count("\n") == 1


def test_what_fits_nowhere_says_so(capsys):
    status, out, _ = plan(capsys, "--config", "7b", "--gpus", "1", "--model.num_layers", "640")
    assert status == 1 and "nothing fits" in out


def test_full_rank_is_refused_no_bottleneck():
    with pytest.raises(ConfigError):
        validate(load_config("1b-full", {"train.recompute": "bottleneck"}), 1)
    assert best(load_config("1b-full"), 64, MACHINES["h100"]).settings["train.recompute"] in ("none", "layer")


@pytest.mark.parametrize("gpus, near", [(7, "give 4 or 8"), (1000, "give 512 or 1,024"), (4097, "give 4,096 or ")])
def test_gpus_that_nothing_divides_get_their_neighbours(capsys, gpus, near):
    status, out, _ = plan(capsys, "--config", "60m", "--gpus", str(gpus))
    assert status == 1 and f"--gpus {gpus:,}: no layout divides 8 layers" in out and near in out


@pytest.mark.parametrize(
    ("key", "column", "value"),
    [
        ("parallel.tensor", "tp", 4),
        ("parallel.pipeline", "pp", 2),
        ("parallel.virtual_pipeline", "vpp", 1),
        ("parallel.sequence", "sequence", False),
        ("parallel.zero", "zero", 3),
        ("train.micro_batch_size", "micro_batch_size", 8),
        ("train.recompute", "recompute", "bottleneck"),
    ],
)
def test_what_the_command_line_says_of_the_layout_is_kept(capsys, tmp_path, key, column, value):
    path = tmp_path / "plan.json"
    arguments = ["--config", "1b", "--gpus", "16", "--json", str(path), f"--{key}", str(value).lower()]
    status, out, _ = plan(capsys, *arguments)
    found = json.loads(path.read_text())
    assert status == 0 and f"as given: {key}={str(value).lower()}" in out and found["kept"] == {key: value}
    assert found["rows"] and {row[column] for row in found["rows"]} == {value}
    rivals = [row for row in found["rivals"].values() if row and column != "recompute"]
    assert {row[column] for row in rivals} <= {value}


def test_null_leaves_the_layout_free(capsys):
    status, out, _ = plan(capsys, "--config", "60m", "--gpus", "8", "--parallel.zero", "null")
    assert status == 0 and "as given" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["60m", "--gpus", "8", "--parallel.tensor", "3"], "no layout of 8 GPUs has that: parallel.tensor=3: tensor ×"),
        (["60m", "--gpus", "8", "--parallel.tensor", "8"], "has that: model.ffn_hidden_size=2064: 2:4 groups would"),
        (["60m", "--gpus", "1", "--parallel.pipeline", "2"], "no layout of 1 GPU has that: parallel.pipeline=2: "),
        (["60m", "--gpus", "8", "--train.micro_batch_size", "7"], "not divisible by train.micro_batch_size=7; give a"),
        (["60m", "--gpus", "8", "--parallel.zero", "2", "--parallel.pipeline", "2"], "moves gradients during backward"),
        (["60m-full", "--gpus", "8", "--train.recompute", "bottleneck"], "full rank has no bottleneck"),
        (["60m", "--gpus", "6", "--parallel.zero", "2"], "among so many; give 4 or 8\n"),
        (["60m", "--gpus", "6", "--parallel.tensor", "8"], "give 4 or 8, and leave out --parallel.tensor 8"),
    ],
)
def test_a_layout_that_is_not_there_is_named_with_its_reason(capsys, tmp_path, arguments, message):
    status, out, _ = plan(capsys, "--config", *arguments)
    assert status == 1 and message in out
    path = tmp_path / "planned.yaml"
    status, out, _ = plan(capsys, "--config", *arguments, "--yaml", str(path))
    assert status == 1 and f"; not written: {path}" in out and not path.exists()


def test_numbers_that_are_given_need_not_be_powers_of_two(capsys, tmp_path):
    path = tmp_path / "plan.json"
    shape = ["--model.num_layers", "9", "--train.global_batch_size", "576"]
    given = ["--parallel.pipeline", "3", "--parallel.virtual_pipeline", "3", "--train.micro_batch_size", "6"]
    status, _, _ = plan(capsys, "--config", "60m", "--gpus", "6", "--json", str(path), *shape, *given)
    best_one = json.loads(path.read_text())["recommended"]
    assert status == 0 and [best_one[key] for key in ("pp", "vpp", "micro_batch_size")] == [3, 3, 6]


def test_a_stage_that_is_given_is_planned_without_data_parallelism(capsys):
    status, out, _ = plan(capsys, "--config", "60m", "--gpus", "1", "--parallel.zero", "1")
    assert status == 0 and "DP 1, ZeRO 1" in out


@pytest.mark.parametrize("recompute", ("none", "layer", "bottleneck"))
def test_rivals_recompute_what_is_given(capsys, tmp_path, recompute):
    path = tmp_path / "plan.json"
    plan(capsys, "--config", "60m", "--gpus", "8", "--json", str(path), "--train.recompute", recompute)
    rivals = {name: row["recompute"] for name, row in json.loads(path.read_text())["rivals"].items()}
    assert rivals["low rank"] == recompute
    assert rivals["full rank"] == recompute or recompute == "bottleneck"


@pytest.mark.parametrize("preset", [name for name in presets() if not name.startswith("quickstart")])
def test_every_preset_has_a_plan(capsys, preset):
    status, out, errors = plan(capsys, "--config", preset, "--gpus", "8")
    assert status == 0 and not errors
    assert ("each at its best layout" in out) != preset.endswith("-full")


def test_what_was_planned_without_a_deepspeed_json_is_written_without_it(capsys, tmp_path):
    given, path = tmp_path / "zero.json", tmp_path / "planned.yaml"
    given.write_text('{"zero_optimization": {"stage": 3}}')
    arguments = ["--parallel.deepspeed_config", str(given), "--gpus", "8", "--yaml", str(path)]
    status, out, _ = plan(capsys, "--config", "60m", *arguments)
    assert status == 0 and "note: parallel.deepspeed_config is not read here" in out
    validate(load_config(str(path)), 8)
