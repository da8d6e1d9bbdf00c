"""Mistakes in Muon's settings are one line, before anything starts."""

import json

import pytest

from elas.config import load_config
from elas.config.describe import describe_optimizer
from elas.config.phases import unreached
from elas.config.rules import validate
from elas.config.schema import OptimizerConfig
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


def test_the_plan_counts_the_products_of_spectral_norms():
    from elas.optim import muon

    assert plan.SQUARINGS == muon.SQUARINGS
    spectron = load_config("60m")
    plain = load_config("60m", {"optimizer.normalize": "none"})
    full = {"low_rank.kind": "none"}
    cpu, gpu = (
        plan.iteration_flops(spectron, device) - plan.iteration_flops(plain, device) for device in ("cpu", "cuda")
    )
    factors = [(max(one.n, one.k), min(one.n, one.k)) for one in plan.matrices(spectron)]
    assert cpu == 8 * sum(2 * n * k**2 for n, k in factors)
    assert gpu - cpu == 8 * sum(48 * k**3 for _, k in factors)
    assert len({plan.iteration_flops(load_config("60m", full | {"optimizer.normalize": how}), "cuda")
                for how in ("none", "spectron")}) == 1  # fmt: skip


def test_measuring_pairs_of_a_full_rank_model_warns():
    full = {**BASE, "low_rank.kind": "none"}
    assert any("no factor pairs" in line for line in unreached(load_config(None, {**full, "log.pairs_every_steps": 7})))
    assert not any("no factor pairs" in line for line in unreached(load_config(None, full)))


def test_spectron_at_full_rank_warns_that_steps_are_plain_muons():
    config = load_config("quickstart", {"low_rank.kind": "none"})
    (line,) = [line for line in unreached(config) if line.startswith("optimizer.normalize='spectron'")]
    assert "whose rates are about a fifth; set it to none, and optimizer.lr=0.025 to such a rate" in line
    assert not any("normalize" in line for line in unreached(load_config("quickstart")))


def test_another_optimizer_wants_its_rate_and_leaves_the_formers_settings_out(tmp_path):
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

    (tmp_path / "mine.yaml").write_text("base: quickstart\noptimizer:\n  kind: loro\n")
    for source, settings in (("quickstart", {"optimizer.kind": "loro"}), (str(tmp_path / "mine.yaml"), {})):
        with pytest.raises(
            UserError, match=r"other learning rates than muon, whose is optimizer\.lr=0\.025; give"
        ) as raised:
            load_config(source, settings)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"is of muon alone, and optimizer\.kind is adamw"):  # given, not taken over
        validate(
            load_config(
                "quickstart", {"optimizer.kind": "adamw", "optimizer.lr": 0.1, "optimizer.normalize": "spectron"}
            ),
            1,
        )
    (tmp_path / "list.yaml").write_text("optimizer:\n  kind: [muon]\n")
    assert load_config(str(tmp_path / "list.yaml"), {"optimizer.kind": "loro"}).optimizer.kind == "loro"
    for wrong in ("moun", ["adamw"], None):
        with pytest.raises(UserError, match=r"optimizer\.kind"):
            load_config("quickstart", {"optimizer.kind": wrong})


@pytest.mark.parametrize(
    "preset, settings, says",
    [
        ("quickstart", {}, "Muon with Spectron's steps 0.025, all else AdamW 0.003, weight decay 0.01"),
        ("quickstart", {"optimizer.lr_other": None}, "Spectron's steps 0.025, all else AdamW 0.025, weight decay 0.01"),
        ("quickstart", {"optimizer.normalize": "none"}, "Muon 0.025, all else AdamW 0.003, weight decay 0.01"),
        ("60m-loro", {}, "LORO 0.01, weight decay 0"),
        ("60m-full", {}, "AdamW 0.001, weight decay 0"),
    ],
)
def test_a_run_says_its_optimizer_and_rates(preset, settings, says):
    assert says in describe_optimizer(load_config(preset, settings))
