"""`elas bench generate`: a complete row for each variant, what a cache holds, and one line for bad options."""

import json

import pytest

from elas import cli
from elas.bench.generate_models import NAMES
from elas.command import exit_status
from elas.config import load_config

SMALL = ["--preset", "quickstart", "--layers", "1", "--new-tokens", "2", "--repeats", "1", "--threads", "1"]


def bench(*arguments) -> int:
    return exit_status(cli.run, ["bench", "generate", *SMALL, *arguments])


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "g.json"
    assert bench("--batches", "1,2", "--contexts", "16", "--json", str(path)) == 0
    return json.loads(path.read_text())


def test_a_row_for_every_dtype_batch_and_variant(facts):
    expected = [(dtype, batch, name) for dtype in ("float32", "bfloat16") for batch in (1, 2) for name in NAMES]
    assert [(row["dtype"], row["batch"], row["variant"]) for row in facts["rows"]] == expected
    for row in facts["rows"]:
        assert row["not_run"] is None and row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["ttft_ms"] == pytest.approx(1e3 * row["batch"] * 16 / row["prefill_tokens_per_s"])
        assert row["peak_bytes"] > 0 and row["bandwidth_share"] > 0


def test_caches_hold_what_the_formula_says(facts):
    """Keys and values are 2h numbers a token and layer; with the latent cache h + r."""
    config = load_config("quickstart")
    wide, rank = config.model.hidden_size, config.low_rank.rank
    for row in facts["rows"]:
        numbers = wide + rank if row["variant"] == "elas_latent" else 2 * wide
        assert row["kv_bytes_per_token"] == numbers * (4 if row["dtype"] == "float32" else 2)
    (ratio,) = {r["ratio"] for r in facts["ratios"] if r["what"] == "kv_bytes_per_token"}
    assert ratio == (wide + rank) / (2 * wide)


def test_what_takes_too_long_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "g.json"
    more = ["--dtypes", "float32", "--variants", "elas", "--batches", "1", "--contexts", "8,4000000"]
    assert bench(*more, "--limit-s", "1", "--json", str(path)) == 0
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert rows == json.loads(out.splitlines()[-1])["rows"]
    assert rows[0]["not_run"] is None and "a prefill would take about" in rows[1]["not_run"]
    assert "note: float32 1 × 4000000: not run" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "elsa"], "did you mean 'elas'?"),
        (["--batches", "0"], "--batches '0': must be different whole numbers above 0"),
        (["--contexts", "512,512"], "--contexts '512,512': must be different"),
        (["--dtypes", "float16"], "--dtypes float16: 'float16' is unknown"),
        (["--new-tokens", "0"], "--new-tokens 0: must be at least 1"),
        (["--preset", "60n"], "--preset 60n: '60n' is unknown"),
    ],
)
def test_bad_options_are_one_line(more, message, capsys):
    assert bench(*more) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
