"""Every sharded layer equals its unsharded formula: outputs, input gradients, weight gradients.

Tolerance 1e-5 of a tensor's largest value: the layers run in fp32 (6e-8), the formulas in fp64; a result is a chain of
at most five products of up to 128 terms each, whose rounding adds up to about 1e-6. A shard in the wrong place, a sum
too many or too few is wrong by 0.1 and more.
"""

from functools import lru_cache

import pytest
import torch
from layer_cases import CASES, NG, NP, QKV, H, check_layers, megatron_config
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]

TOLERANCE = 1e-5


@lru_cache
def all_errors(tp: int, sequence: bool) -> list[dict[str, dict[str, float]]]:
    return run_ranks(tp, check_layers, tp, sequence)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_equals_the_unsharded_formula(case, tp, sequence):
    for rank, errors in enumerate(all_errors(tp, sequence)):
        wrong = {name: error for name, error in errors[case].items() if not error < TOLERANCE}
        assert not wrong, f"on rank {rank}: {wrong}"


def test_every_weight_was_compared():
    """A layer that lost a parameter would pass in silence."""
    names = set(all_errors(2, True)[0]["attention"]) | set(all_errors(2, True)[0]["ffn relu2 2:4"])
    linears = {"linear_qkv.factor_in", *(f"linear_qkv.factor_out_{n}" for n in "qkv")}
    linears |= {f"linear_{place}.factor_{end}" for place in ("proj", "fc1", "fc2") for end in ("in", "out")}
    assert names == linears | {"output 0", "input gradient"}


def qkv_forward(tp: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.low_rank import LowRankColumnParallelLinear

    parallel.initialize(ParallelConfig(tensor=tp), seed=1)
    config = megatron_config(tp, False, {})
    layer = LowRankColumnParallelLinear(H, sum(QKV.values()), config=config, tp_comm_buffer_name="qkv")
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 1, H)
    with torch.no_grad():
        return layer(x)[0], layer.expand(layer.bottleneck(x))


def test_forward_of_qkv_has_the_layout_of_megatron():
    """For each key/value head: its query heads, its key, its value."""
    mixed, (q, k, v) = run_ranks(2, qkv_forward, 2)[1]
    hn, groups = H // NP, NG // 2
    for g in range(groups):
        head = mixed[..., g * (NP // NG + 2) * hn :]
        width = NP // NG * hn
        assert torch.equal(head[..., :width], q[..., g * width : (g + 1) * width])
        assert torch.equal(head[..., width : width + hn], k[..., g * hn : (g + 1) * hn])
        assert torch.equal(head[..., width + hn : width + 2 * hn], v[..., g * hn : (g + 1) * hn])


def refusals() -> list[str]:
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear

    parallel.initialize(ParallelConfig(), seed=1)
    config = megatron_config(1, False, {})
    messages = []
    for build in (
        lambda: LowRankColumnParallelLinear(H, H, config=config, is_expert=True),
        lambda: LowRankColumnParallelLinear(H, H, config=config, gather_output=True),
        lambda: LowRankColumnParallelLinear(H, H, config=config, outputs={"a": H, "b": 1}),
        lambda: LowRankRowParallelLinear(H, H, config=config, input_is_parallel=False),
    ):
        try:
            build()
        except ValueError as refusal:
            messages.append(str(refusal))
    return messages


def test_what_cannot_be_had_is_refused():
    messages = run_ranks(1, refusals)[0]
    words = ("experts", "split", "add up", "split input")
    assert len(messages) == len(words)
    assert all(word in message for word, message in zip(words, messages))
