"""`elas bench step`: complete rows, a peer that computes the same function, and no speed for a wrong kernel."""

import json

import pytest
from wrong_kernels import fused_kernel, wrong_gradient

from elas import cli
from elas.bench import step_models
from elas.command import exit_status
from elas.errors import UserError

KEYS = {"variant", "dtype", "tokens_per_s", "saved_bytes", "peak_bytes", "resident_bytes", "step_ms", "params"}
VARIANTS = ["hf_llama", "full_swiglu", "lowrank_swiglu", "lowrank_relu2", "elas"]
SMALL = ["--preset", "quickstart", "--layers", "1", "--batch", "2", "--seq", "32", "--repeats", "1", "--threads", "1"]


def bench(tmp_path, *arguments):
    path = tmp_path / "step.json"
    status = exit_status(cli.run, ["bench", "step", *SMALL, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    status, facts = bench(tmp_path_factory.mktemp("step"))
    assert status == 0, facts["rows"]
    return facts


def test_a_row_for_every_dtype_and_variant(facts):
    assert [(r["dtype"], r["variant"]) for r in facts["rows"]] == [
        (d, v) for d in ("float32", "bfloat16") for v in VARIANTS
    ]
    for row in facts["rows"]:
        assert row.keys() >= KEYS
        assert row["tokens_per_s"] == pytest.approx(64 / row["step_ms"] * 1e3)
        assert 0 < row["saved_bytes"] < row["peak_bytes"]
        assert row["peak_bytes"] > row["resident_bytes"] >= 6 * row["params"]  # bf16: weight and two moments


def test_the_peer_is_the_full_rank_model(facts):
    """Same parameters, same loss and gradient norm of the first step: 1e-5, one rounding in another order."""
    peer, ours = facts["rows"][:2]
    assert peer["params"] == ours["params"]
    assert peer["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert peer["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_parameters_are_the_formula(facts):
    shape = step_models.Shape("quickstart", layers=1, batch=2, seq=32, zero=1)
    for row in facts["rows"]:
        config = step_models.variant_config(row["variant"], shape, row["dtype"])
        assert row["params"] == step_models.parameter_count(config)


def test_no_speed_for_a_wrong_kernel(tmp_path, capsys):
    arguments = ["--dtypes", "float32", "--variants", "lowrank_relu2,elas"]
    fused = step_models.OVERRIDES["elas"] | {"sparsity.ffn_memory": "fused"}
    with fused_kernel(wrong_gradient), pytest.MonkeyPatch.context() as patch:
        patch.setitem(step_models.OVERRIDES, "elas", fused)
        status, facts = bench(tmp_path, *arguments)
    assert status == 1
    good, bad = facts["rows"]
    assert good["tokens_per_s"] > 0 and not good["wrong"]
    assert bad["wrong"] and bad["tokens_per_s"] is None and bad["step_ms"] is None
    assert "WRONG" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    shape = step_models.Shape("7b", layers=None, batch=1, seq=32, zero=1)
    config = step_models.variant_config("full_swiglu", shape, "bfloat16")
    monkeypatch.setattr(step_models, "free_memory", lambda: 2**34)
    with pytest.raises(UserError, match="GiB"):
        step_models.refuse_if_too_large({"full_swiglu": config})
