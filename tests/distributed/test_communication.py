"""How many values cross the tensor-parallel group in one transformer layer: counted, not timed.

Convention: a collective is counted on one rank by the values of its whole tensor (an all-reduce its tensor, an
all-gather its output, a reduce-scatter its input), for each token of the whole sequence. On the wire a ring sends about
twice that for an all-reduce, once for each of the others. Legend: h hidden, r rank, AR all-reduce, AG all-gather, RS
reduce-scatter; attention with as many key/value heads as query heads does not change any count.

    a layer              forward               backward
    low rank             AR r + r              AR 3r + r                   6r in all: bottlenecks of q, k, v and up
    low rank, sequence   AG 3r + r, RS r + r   RS 3r + r, AG r + r         12r, each half an all-reduce on the wire
    full rank            AR h + h              AR h + h                    4h in all, as Megatron
    full rank, sequence  AG h + h, RS h + h    AG 2h + h (or 2h), RS 2h    Megatron keeps the shard of a linear's input
                                                                           and gathers it again for the weight gradient

The last AG: qkv gathers its input again, as does a gated full-rank FFN. `ElasFFN` with squared ReLU keeps the gathered
input instead, so it gathers h less in the backward pass, for h·(t − 1)/t values a token more of memory.
"""

import pytest
import torch
from layer_cases import FULL, LOWRANK, SWIGLU, B, H, R, S, megatron_config
from support.collectives import CountCollectives
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


def count_layer(tp: int, sequence: bool, overrides: dict) -> tuple[dict[str, float], dict[str, float]]:
    """Values a token, by kind of collective, in the forward and the backward pass of one layer."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.spec_utils import build_module

    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.spec import ElasSpecProvider, layer_spec

    parallel.initialize(ParallelConfig(tensor=tp, sequence=sequence), seed=1)
    config = megatron_config(tp, sequence, overrides)
    layer = build_module(layer_spec(ElasSpecProvider(config.low_rank.kind != "none")), config=config, layer_number=1)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(S // tp if sequence else S, B, H, dtype=config.params_dtype, requires_grad=True)
    angles = RotaryEmbedding(config.kv_channels, 1.0)(S)
    value = S * B * x.element_size()
    with CountCollectives() as forward:
        y, _ = layer(x, attention_mask=None, rotary_pos_emb=angles)
    with CountCollectives() as backward:
        y.backward(torch.ones_like(y))
    return tuple({kind: size / value for kind, size in counts.sizes.items()} for counts in (forward, backward))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True], ids=["relu2", "swiglu"])
def test_low_rank(tp, dtype, gated):
    up = 2 * R if gated else R  # gate and up have a bottleneck each
    overrides = {**LOWRANK, "train.dtype": dtype, **(SWIGLU if gated else {})}
    for counts in run_ranks(tp, count_layer, tp, False, overrides):
        assert counts == ({"AR": R + R}, {"AR": 3 * R + up})


@pytest.mark.parametrize("tp", [2, 4])
def test_low_rank_with_sequence_parallelism(tp):
    for counts in run_ranks(tp, count_layer, tp, True, LOWRANK):
        assert counts == ({"AG": 3 * R + R, "RS": R + R}, {"RS": 3 * R + R, "AG": R + R})


def test_full_rank():
    for counts in run_ranks(2, count_layer, 2, False, FULL):
        assert counts == ({"AR": 2 * H}, {"AR": 2 * H})


@pytest.mark.parametrize("gated", [False, True], ids=["relu2", "swiglu"])
def test_full_rank_with_sequence_parallelism(gated):
    gathered_again = 2 * H if gated else H
    for counts in run_ranks(2, count_layer, 2, True, {**FULL, **(SWIGLU if gated else {})}):
        assert counts == ({"AG": 2 * H, "RS": 2 * H}, {"AG": 2 * H + gathered_again, "RS": 2 * H})


def test_low_rank_sends_less():
    """At r = h/4 the whole layer, forward and backward, sends 4h / 6r = 2.67 times less than Megatron's full rank."""
    overrides = {**LOWRANK, "low_rank.rank": H // 4}
    low, full = (run_ranks(2, count_layer, 2, False, o)[0] for o in (overrides, FULL))
    total = [sum(sum(counts.values()) for counts in passes) for passes in (full, low)]
    assert total[0] / total[1] == pytest.approx(8 / 3)
