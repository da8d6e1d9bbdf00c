"""`elas bench comm`: what real ranks send is what the formulas say."""

import json

import pytest

from elas import cli
from elas.bench.comm_layers import ring_share
from elas.command import exit_status

H, F, R = 256, 1024, 64  # the quickstart preset


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("comm") / "comm.json"
    arguments = ["--preset", "quickstart", "--tp", "2", "--batch", "2", "--seq", "16", "--repeats", "1"]
    assert exit_status(cli.run, ["bench", "comm", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_ring_of_two_sends_an_all_reduce_once_a_gather_half():
    assert ring_share("all_reduce", 2) == 1 and ring_share("all_gather", 2) == ring_share("reduce_scatter", 2) == 0.5
    assert ring_share("all_reduce", 4) == 1.5


def test_bytes_are_the_formulas(facts):
    """Values a token by hand, two ranks, fp32: AR counts once, AG and RS half."""
    want = {
        ("full", False): (2 * H, 2 * H),
        ("full", True): (H + H, 2 * H + H),
        ("lowrank_gathered", False): (5 * H + F, 3 * H + F),
        ("lowrank_gathered", True): (H + 3 * H + F + H, H + H + F + H),
        ("bottleneck", False): (2 * R, 4 * R),
        ("bottleneck", True): (2 * R + R, R + 2 * R),
    }
    rows = {(row["variant"], row["sequence_parallel"]): row for row in facts["rows"]}
    assert rows.keys() == want.keys()
    for case, (forward, backward) in want.items():
        row = rows[case]
        assert (row["fwd_bytes_per_token_layer"], row["bwd_bytes_per_token_layer"]) == (4 * forward, 4 * backward), case
        assert row["formula_bytes"] == 4 * (forward + backward)
        assert row["matches"] and row["step_ms"] > 0


def test_at_a_quarter_of_the_width_the_bottleneck_sends_less(facts):
    """r = h/4: 4h over 6r is 8/3."""
    total = {r["variant"]: r["formula_bytes"] for r in facts["rows"] if not r["sequence_parallel"]}
    assert total["full"] / total["bottleneck"] == pytest.approx(8 / 3)


def test_the_naive_layer_computes_what_the_bottleneck_layer_does(facts):
    errors = [row["rel_err"] for row in facts["rows"] if row["variant"] == "lowrank_gathered"]
    assert len(errors) == 2 and max(errors) < 1e-5  # fp32, the same sums in another order
