"""`elas bench ffn`: complete rows, counted bytes, and no speed for a wrong kernel."""

import json

import pytest
import torch
from wrong_kernels import fused_kernel, wrong_gradient, wrong_tokens, wrong_value

from elas import cli
from elas.bench.ffn_variants import gated_width
from elas.command import exit_status
from elas.config import ffn_width, load_config
from elas.kernels.relu2_24 import registry

KEYS = {"shape", "dtype", "variant", "fwd_ms", "bwd_ms", "saved_bytes", "peak_bytes", "rel_err", "implementation"}
VARIANTS = ["full_swiglu", "lowrank_swiglu", "lowrank_relu2", "elas_eager", "elas_compressed", "elas_fused"]
TOKENS = 96


def bench(tmp_path, *arguments):
    path = tmp_path / "ffn.json"
    fixed = ["--shapes", "quickstart", "--tokens", str(TOKENS), "--repeats", "1", "--json", str(path)]
    status = exit_status(cli.run, ["bench", "ffn", *fixed, *arguments])
    return status, json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    threads = torch.get_num_threads()
    status, facts = bench(tmp_path_factory.mktemp("ffn"), "--threads", "1")
    assert status == 0
    assert facts["threads"] == 1 and torch.get_num_threads() == threads
    assert registry.implementations("eager")[-1].name != "topk"  # registered for the benchmark alone
    return facts


def test_a_row_for_every_dtype_and_variant(rows):
    assert [(r["dtype"], r["variant"]) for r in rows["rows"]] == [
        (d, v) for d in ("float32", "bfloat16") for v in VARIANTS
    ]
    for row in rows["rows"]:
        assert row.keys() >= KEYS
        assert row["fwd_ms"] > 0 and row["bwd_ms"] > 0
        assert 0 < row["rel_err"] <= row["bound"]
    assert [r["implementation"] for r in rows["rows"][:4]] == [None, None, "reference", "topk"]


def test_ratios_are_those_of_the_rows(rows):
    by = {(r["dtype"], r["variant"]): r for r in rows["rows"]}
    assert {(r["of"], r["to"]) for r in rows["ratios"]} >= {
        ("elas_fused", "lowrank_relu2"), ("elas_fused", "elas_eager"), ("elas_compressed", "lowrank_relu2"),
        ("full_swiglu", "elas_fused"),
    }  # fmt: skip
    for ratio in rows["ratios"]:
        a, b = (by[ratio["dtype"], ratio[side]] for side in ("of", "to"))
        if ratio["what"] == "time":
            want = (a["fwd_ms"] + a["bwd_ms"]) / (b["fwd_ms"] + b["bwd_ms"])
        else:
            want = a[ratio["what"]] / b[ratio["what"]]
        assert ratio["ratio"] == pytest.approx(want)


def test_saved_bytes_are_the_formula(rows):
    """u and v are r wide; gate, up, silu(gate) and their product, or relu(z) and its square, f wide."""
    config = load_config("quickstart", {})
    f, r = ffn_width(config), config.low_rank.rank
    gated = gated_width(config)
    assert gated % 8 == 0 and 0 <= f / 1.5 - gated < 8
    for row in rows["rows"]:
        size = 4 if row["dtype"] == "float32" else 2
        values = {
            "full_swiglu": 4 * gated,
            "lowrank_swiglu": 2 * r + 4 * gated + r,
            "lowrank_relu2": r + 2 * f + r,
            "elas_eager": r + 2 * f + r,
            "elas_compressed": r + f / 2 + r,
            "elas_fused": r + r,
        }[row["variant"]]
        codes = f / 8 if row["variant"] == "elas_compressed" else 0  # a nibble for each group of four
        assert row["saved_bytes"] == TOKENS * (size * values + codes), row["variant"]
        assert row["peak_bytes"] >= row["saved_bytes"]


@pytest.mark.parametrize("core", [wrong_value, wrong_gradient, wrong_tokens])
def test_no_speed_for_a_wrong_kernel(tmp_path, capsys, core):
    arguments = ["--dtypes", "float32", "--variants", "lowrank_relu2,elas_fused"]
    with fused_kernel(core):
        status, facts = bench(tmp_path, *arguments)
    assert status == 1
    good, bad = facts["rows"]
    assert good["fwd_ms"] > 0
    assert bad["implementation"] == "injected" and bad["rel_err"] > bad["bound"]
    assert bad["fwd_ms"] is bad["bwd_ms"] is bad["saved_bytes"] is bad["peak_bytes"] is None
    assert facts["ratios"] == []
    assert "WRONG" in capsys.readouterr().out


def test_a_memory_mode_that_cannot_run_is_left_out_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "implementations", lambda memory: [])
    status, facts = bench(tmp_path, "--dtypes", "float32", "--variants", "full_swiglu,elas_fused")
    assert status == 0
    assert [row["variant"] for row in facts["rows"]] == ["full_swiglu"]
    assert "elas_fused" in facts["notes"][0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["ffn", "--shapes", "60n"], "did you mean '60m'"),
        (["ffn", "--dtypes", "fp8"], "choose from float32,bfloat16"),
        (["ffn", "--tokens", "0"], "--tokens 0"),
        (["ffn", "--variants", "elas_fused,elas_fused"], "different"),
        (["fnn"], "did you mean 'ffn'"),
        (["step", "--layers", "100000"], "--layers"),
        (["step", "--seq", "0"], "--seq 0"),
        (["comm", "--tp", "1"], "must be at least 2"),
        (["comm", "--tp", "3"], "model.num_attention_heads"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    assert exit_status(cli.run, ["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["ffn", "step", "comm"])
def test_help_ends_in_an_example(capsys, command):
    with pytest.raises(SystemExit):
        cli.run(["bench", command, "--help"])
    assert f"example:\n  elas bench {command}" in capsys.readouterr().out
