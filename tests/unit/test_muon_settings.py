"""Mistakes in Muon's settings are one line, before anything starts."""

import json

import pytest
import torch

from elas.config import load_config
from elas.config.describe import describe_optimizer
from elas.config.phases import unreached
from elas.config.rules import validate
from elas.config.schema import OptimizerConfig
from elas.engine.deepspeed import fit_sub_groups
from elas.errors import UserError
from elas.plan import muon as plan
from elas.plan.muon import check_sub_groups, matrix_parameters

BASE = {"optimizer.kind": "muon", "data.train": "x"}
MISTAKES = [
    ({"optimizer.momentum": 1}, "optimizer.momentum=1.0: out of range"),
    ({"optimizer.momentum": -0.5}, "optimizer.momentum=-0.5: out of range"),
    ({"optimizer.momentum": "nan"}, "optimizer.momentum="),
    ({"optimizer.lr_other": 0}, "optimizer.lr_other=0.0: out of range"),
    ({"optimizer.lr_other": 1e4}, "optimizer.lr_other=10000.0: out of range"),
    ({"optimizer.lr": -1}, "optimizer.lr=-1.0: out of range"),
    ({"optimizer.muon_steps": 0}, "optimizer.muon_steps=0: out of range"),
    ({"optimizer.muon_steps": 21}, "optimizer.muon_steps=21: out of range"),
    ({"optimizer.normalize": "spectral"}, "did you mean 'spectron'"),
    ({"optimizer.kind": "moun"}, "did you mean 'muon'"),
    ({"optimizer.kind": "adamw", "optimizer.momentum": 0.9}, "is of muon alone, and optimizer.kind is adamw"),
    ({"optimizer.kind": "loro", "optimizer.lr_other": 0.1}, "leave it out, or set it to null"),
    ({"optimizer.exact_every": 7}, "is of loro alone, and optimizer.kind is muon"),
    ({"optimizer.refresh": "none"}, "is of loro alone, and optimizer.kind is muon"),
    ({"optimizer.lr": 1e-320}, "give a value from 1e-12 to 1000"),
    ({"optimizer.weight_decay": 1000}, "optimizer.weight_decay=1000.0: times a learning rate of 0.001 is not below 1"),
    ({"optimizer.weight_decay": 10, "optimizer.lr_other": 0.1}, "give less than 10"),
    ({"optimizer.weight_decay": 1e30}, "too large; give at most 2147483647"),
    ({"optimizer.lr": 1e30}, "out of range; give a value from 1e-12 to 1000"),
    ({"optimizer.name": "muon"}, "did you mean optimizer.kind?"),
    ({"optimizer.nesterov": "true"}, "did you mean optimizer.momentum?"),
    ({"optimizer.ns_step": 5}, "did you mean optimizer.muon_steps?"),
    ({"optimizer.foreach": "true"}, "elas config optimizer lists its keys"),
]


@pytest.mark.parametrize("settings, says", MISTAKES)
def test_a_mistake_is_one_line(settings, says):
    with pytest.raises(UserError) as raised:
        validate(load_config(None, {**BASE, **settings}), None)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "of_deepspeed, says",
    [
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}, "sets optimizer; remove it there"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "its state cannot be offloaded"),
    ],
)
def test_deepspeeds_optimizer_and_offloading_are_refused(tmp_path, of_deepspeed, says):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **of_deepspeed}))
    with pytest.raises(UserError, match=says):
        validate(load_config(None, {**BASE, "parallel.deepspeed_config": str(path)}), 1)


def test_spectron_under_zero_3_wants_its_pairs_in_one_sub_group(tmp_path):
    def check(size: int, world: int = 1, **more) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": size}}))
        settings = {"optimizer.normalize": "spectron", "parallel.deepspeed_config": str(path), **more}
        config = load_config("60m", {**BASE, "optimizer.lr": 0.02, **settings})
        validate(config, world)
        check_sub_groups(config, world)

    all_of_them = matrix_parameters(load_config("60m", BASE))
    check(all_of_them)
    check(all_of_them // 2, world=2)
    check(1000, **{"optimizer.normalize": "none"})
    check(1000, **{"low_rank.kind": "none"})  # no pairs
    with pytest.raises(UserError, match=f"set zero_optimization.sub_group_size to {all_of_them} or more"):
        check(all_of_them - 1)
    with pytest.raises(UserError, match="ZeRO 3 may part them: sub-groups of 1,000 weights"):
        check(1000, world=2)
    check_sub_groups(load_config("7b", {"parallel.zero": 3}), 1)  # more than DeepSpeed's default; `fit_sub_groups`


@pytest.mark.parametrize("dp, size", [(1, 4_800_000_000), (3, 1_600_000_000), (8, 1_000_000_000)])
def test_a_sub_group_of_zero_3_has_all_weights_of_a_rank(dp, size):
    chunks = [torch.nn.Linear(40_000, 60_000, bias=False, device="meta") for _ in range(2)]
    settings = {"zero_optimization": {"stage": 3}}
    fit_sub_groups(settings, chunks, load_config("7b"), dp)
    assert settings["zero_optimization"]["sub_group_size"] == size
    for kept in ({"stage": 3, "sub_group_size": 7}, {"stage": 1}):
        settings = {"zero_optimization": dict(kept)}
        fit_sub_groups(settings, chunks, load_config("7b"), dp)
        assert settings["zero_optimization"] == kept
    settings = {"zero_optimization": {"stage": 3}}
    fit_sub_groups(settings, chunks, load_config("60m-full"), dp)
    assert settings == {"zero_optimization": {"stage": 3}}


def test_the_plan_counts_the_products_of_spectral_norms():
    from elas.optim import muon

    assert plan.SQUARINGS == muon.SQUARINGS
    spectron = load_config("60m")
    plain = load_config("60m", {"optimizer.normalize": "none", "optimizer.lr": 0.0045})
    full = {"low_rank.kind": "none"}
    cpu, gpu = (
        plan.iteration_flops(spectron, device) - plan.iteration_flops(plain, device) for device in ("cpu", "cuda")
    )
    factors = [(max(one.n, one.k), min(one.n, one.k)) for one in plan.matrices(spectron)]
    assert cpu == 8 * sum(2 * n * k**2 for n, k in factors)
    assert gpu - cpu == 8 * sum(48 * k**3 for _, k in factors)
    divided, whole = (
        plan.iteration_flops(load_config("60m", {**full, "optimizer.normalize": how, "optimizer.lr": 0.1}), "cuda")
        for how in ("spectron", "none")
    )
    assert divided == whole


def test_measuring_pairs_of_a_full_rank_model_warns():
    full = {**BASE, "low_rank.kind": "none"}
    assert any("no factor pairs" in line for line in unreached(load_config(None, {**full, "log.pairs_every_steps": 7})))
    assert not any("no factor pairs" in line for line in unreached(load_config(None, full)))


def test_spectron_at_full_rank_warns_that_steps_are_plain_muons():
    config = load_config("quickstart", {"low_rank.kind": "none"})
    (line,) = [line for line in unreached(config) if line.startswith("optimizer.normalize='spectron'")]
    assert "set it to none, and optimizer.lr to a rate of plain Muon's, such as 0.006" in line
    assert describe_optimizer(config).startswith("Muon 0.025")
    assert not any("optimizer." in line for line in unreached(load_config("quickstart")))


def test_spectrons_rate_for_what_is_no_matrix_warns():
    (line,) = [
        line for line in unreached(load_config("quickstart", {"optimizer.lr_other": None})) if "lr_other" in line
    ]
    assert line.endswith("give it, such as 0.003")
    plain = {**BASE, "optimizer.lr": 0.0045}
    assert not any("lr_other" in line for line in unreached(load_config(None, plain)))


def test_another_optimizer_leaves_the_formers_settings_out(tmp_path):
    preset = load_config("quickstart").optimizer
    assert (preset.normalize, preset.lr_other) == ("spectron", 0.003)
    adamw = load_config("quickstart", {"optimizer.kind": "adamw", "optimizer.lr": 0.0015})
    validate(adamw, 1)
    assert (adamw.optimizer.lr, adamw.optimizer.lr_other, adamw.optimizer.normalize) == (0.0015, None, "none")
    assert adamw.optimizer.weight_decay == preset.weight_decay
    muon = load_config("60m-loro", {"optimizer.kind": "muon", "optimizer.lr": 0.0045, "schedule.kind": "cosine"})
    validate(muon, 1)
    assert muon.optimizer.exact_every == OptimizerConfig.exact_every
    kept = load_config("quickstart", {"optimizer.kind": "muon", "optimizer.lr": 0.02})
    assert (kept.optimizer.normalize, kept.optimizer.lr_other) == ("spectron", 0.003)
    given = {"optimizer.kind": "adamw", "optimizer.lr": 0.1, "optimizer.normalize": "spectron"}
    with pytest.raises(UserError, match=r"is of muon alone, and optimizer\.kind is adamw"):  # given, not taken over
        validate(load_config("quickstart", given), 1)
    (tmp_path / "list.yaml").write_text("optimizer:\n  kind: [muon]\n")
    assert load_config(str(tmp_path / "list.yaml"), {"optimizer.kind": "loro"}).optimizer.kind == "loro"


OF_FORMER = "optimizer.lr=0.025: is a rate of muon with normalize=spectron, and the optimizer is {} now; give"


def test_another_optimizer_wants_its_rate_from_any_layer_above(tmp_path):
    def file(name: str, base: str, *lines: str) -> str:
        text = "".join(f"  {line}\n" for line in lines)
        (tmp_path / name).write_text(f"base: {base}\noptimizer:\n{text}")
        return str(tmp_path / name)

    loro = file("loro.yaml", "quickstart", "kind: loro")
    plain = file("plain.yaml", "quickstart", "normalize: none")
    back = file("back.yaml", "loro.yaml", "kind: muon", "normalize: spectron")
    for source, settings, now in (
        ("quickstart", {"optimizer.kind": "loro"}, "loro"),
        ("quickstart", {"optimizer.normalize": "none"}, "muon with normalize=none"),
        (loro, {}, "loro"),
        (plain, {}, "muon with normalize=none"),
        (file("twice.yaml", "loro.yaml", "kind: adamw"), {}, "adamw"),
    ):
        with pytest.raises(UserError) as raised:
            load_config(source, settings)
        assert OF_FORMER.format(now) in str(raised.value) and "\n" not in str(raised.value)
        assert load_config(source, {**settings, "optimizer.lr": 0.004}).optimizer.lr == 0.004
    assert load_config(back).optimizer.lr == 0.025  # its own again
    assert load_config(file("rate.yaml", "loro.yaml", "lr: 0.005")).optimizer.lr == 0.005
    for wrong in ("moun", ["adamw"], None, {}):
        with pytest.raises(UserError, match=r"optimizer\.kind"):
            load_config("quickstart", {"optimizer.kind": wrong})
    with pytest.raises(UserError, match="did you mean 'spectron'"):
        load_config("quickstart", {"optimizer.normalize": "spectral"})


@pytest.mark.parametrize(
    "preset, settings, says",
    [
        ("quickstart", {}, "Muon with Spectron's steps 0.025, all else AdamW 0.003, weight decay 0.01"),
        ("quickstart", {"optimizer.lr_other": None}, "Spectron's steps 0.025, all else AdamW 0.025, weight decay 0.01"),
        (
            "quickstart",
            {"optimizer.normalize": "none", "optimizer.lr": 0.006},
            "Muon 0.006, all else AdamW 0.003, weight",
        ),
        ("60m-loro", {}, "LORO 0.01, weight decay 0"),
        ("60m-full", {}, "AdamW 0.001, weight decay 0"),
    ],
)
def test_a_run_says_its_optimizer_and_rates(preset, settings, says):
    assert says in describe_optimizer(load_config(preset, settings))
