"""`elas plan --check` on real ranks: what must agree does, and what is wrong in a formula is found.

Speed is not tested: a file of made-up rates takes the place of a measurement.
"""

import json
import os
import subprocess
import sys

import pytest
from support import plan_check_cases
from support.parity_run import SMALL
from support.ranks import run_ranks

from elas.config import load_config
from elas.config.deepspeed import choose_zero_stage
from elas.plan.hardware import measured_machine
from elas.plan.rates import halfway, measured_from
from elas.plan_check.components import components

pytestmark = pytest.mark.timeout(240)

LAYOUTS = {
    "tp2-sp": {"parallel.tensor": 2, "parallel.sequence": True},
    "tp2 full rank": {
        "parallel.tensor": 2,
        "low_rank.kind": "none",
        "model.activation": "swiglu",
        "sparsity.kind": "none",
    },
    "pp2 bf16": {"parallel.pipeline": 2, "train.dtype": "bfloat16"},
    "dp2-zero2": {"parallel.zero": 2},
}


def settings(layout: str) -> dict:
    return {**SMALL, "sparsity.dense_steps": 0, **LAYOUTS[layout]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_components_agree(layout):
    ranks = run_ranks(2, plan_check_cases.watched, settings(layout))
    config = load_config(None, settings(layout))
    choose_zero_stage(config, 2)
    found = components(config, 2, measured_machine(measured_from(plan_check_cases.made_up())), ranks)
    differing = [one.name for one in found if not one.agrees]
    assert not differing
    by_name = {one.name: one for one in found}
    assert by_name["FLOPs"].measured > 1e6 and by_name["kept by a layer"].measured > 1000
    kind = {"tp2-sp": "tensor", "tp2 full rank": "tensor", "pp2 bf16": "pipeline", "dp2-zero2": "data"}[layout]
    assert by_name[f"sent, {kind}"].measured > 10_000
    parts = [by_name[name].measured for name in ("forward and backward", "update")]
    waited = by_name["messages and bubble" if "pp2" in layout else "collectives"].measured
    assert min(*parts, waited) > 0 and sum(parts) < by_name["step"].measured


def test_rates_measured_beside_the_steps():
    """In tensor-parallel groups, where the pieces that are measured are still those of one rank."""
    found = run_ranks(2, plan_check_cases.watched, settings("tp2-sp"), measured=True)[0]
    assert len(found["rates"]) == 2
    between = halfway(*({key: one[key] for key in ("busy", "links")} for one in found["rates"]))
    measured = measured_from({**plan_check_cases.made_up(), **between})
    assert measured.rates(2, "float32").head > 1e6 and measured.links["all_reduce"].latency_s > 0


def test_a_wrong_formula_is_found():
    """Of what ranks did with one configuration, predictions of another differ in each exact component."""
    ranks = run_ranks(2, plan_check_cases.watched, settings("tp2-sp"))
    wrong = load_config(None, {**settings("tp2-sp"), "low_rank.rank": 20, "train.recompute": "none"})
    choose_zero_stage(wrong, 2)
    found = components(wrong, 2, measured_machine(measured_from(plan_check_cases.made_up())), ranks)
    differing = {one.name for one in found if not one.agrees}
    assert differing == {"parameters", "parameters of a rank", "kept by a layer", "sent, tensor", "FLOPs"}


def test_what_watches_leaves_no_trace():
    assert all(run_ranks(2, plan_check_cases.restored))


def test_measured_rates_make_a_hardware_file():
    results = run_ranks(2, plan_check_cases.rates)
    measured = measured_from({**plan_check_cases.made_up(), **{k: results[0][k] for k in ("busy", "links")}})
    assert set(measured.busy) == {1, 2} and measured.links["send"].bytes_per_s > 0
    assert measured.rates(2, "float32").full_rank > 1e6


def test_the_command(tmp_path):
    hardware, result = tmp_path / "hardware.json", tmp_path / "result.json"
    hardware.write_text(json.dumps(plan_check_cases.made_up()))
    (tmp_path / "empty").mkdir()
    given = {**SMALL, "parallel.tensor": 2, "train.global_batch_size": 4}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable,
        "-m",
        "elas.cli",
        "plan",
        "--check",
        "60m",
        "--steps",
        "1",
        "--json",
        str(result),
        *words,
    ]
    done = subprocess.run(
        [*command, "--hardware-file", str(hardware)],
        capture_output=True, text=True, timeout=200, cwd=tmp_path / "empty", env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    facts = json.loads(result.read_text())
    assert facts["ranks"] == 2 and all(one["agrees"] for one in facts["components"])
    assert "TP 2" in done.stdout and "FLOPs" in done.stdout and "DIFFERS" not in done.stdout
    assert not list((tmp_path / "empty").iterdir())
