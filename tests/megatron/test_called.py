"""Modules are called, and nothing takes a weight from another: what hooks on modules rely on."""

import pytest
from called import count_calls, fsdp_against_plain
from small import KINDS
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("full", 2)])
def test_hooks_run_once_a_use(recompute, passes):
    """Of every linear of every kind: forward hooks once (twice if recomputed), backward hooks once."""
    for counts in run_ranks(2, count_calls, recompute):
        assert set(counts) == set(KINDS)
        for kind, linears in counts.items():
            assert len(linears) == 4, f"{kind}: {linears}"
            assert set(linears.values()) == {(passes, passes, 1)}, f"{kind}: {linears}"


def test_hooks_of_what_is_computed_again_from_bottlenecks():
    """Forward hooks of q, k, v run twice, and those of gate and up: that is where ZeRO 3 and FSDP gather weights."""
    for counts in run_ranks(2, count_calls, "bottleneck"):
        for kind, linears in counts.items():
            gated = KINDS[kind].get("model.activation") == "swiglu"
            again = set() if "full rank" in kind else {"linear_qkv", *(["linear_fc1"] if gated else [])}
            for name, calls in linears.items():
                passes = 2 if name.rpartition(".")[2] in again else 1
                assert calls == (passes, passes, 1), f"{kind} {name}: {calls}"


def test_fsdp2_at_each_linear_equals_plain():
    """Weights freed between calls: fp32 sums in another order, 1e-7 each; a stale weight is wrong by 1e-2 and more."""
    for differences in run_ranks(2, fsdp_against_plain):
        for kind, (loss, gradient) in differences.items():
            assert loss < 2e-6 and gradient < 2e-5, f"{kind}: loss {loss:.1e}, gradient {gradient:.1e}"
