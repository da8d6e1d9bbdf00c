"""Models from Megatron-LM's arguments, layers that initialise themselves, and sequences cut over ranks."""

from functools import lru_cache

import pytest
from built import BETWEEN, by_builder, context_parallel, initialised, mlp_of_megatron
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)


@lru_cache
def built() -> list[dict]:
    return run_ranks(2, by_builder, timeout=300.0)


def test_layers_initialise_themselves():
    """Deviations are the factors' own, by 1000 values and more, within 5σ; parts differ over ranks, copies do not."""
    one, other = built()
    for name, (std, wanted) in one["stds"].items():
        if name.endswith(("layernorm.weight", "norm.weight")):
            assert std == 0
        else:
            assert std == pytest.approx(wanted or 0.02, rel=0.12), name
    assert {name for name in one["values"] if "factor" in name and name not in one["split"]}
    for name in one["values"]:
        same = one["values"][name] == other["values"][name]
        assert same == (name not in one["split"]), name


def test_megatrons_switches_of_initialisation_hold():
    """On the CPU ranks draw whole matrices from one stream and keep their parts; without it nothing is drawn."""
    for found in run_ranks(2, initialised, timeout=300.0):
        assert found["whole"]
        assert found["split"] and all(alike == (name not in found["split"]) for name, alike in found["alike"].items())
        assert found["drawn"] == {"lowrank": False, "none": False}


def test_the_builder_follows_the_arguments():
    for found in built():
        assert "decoder.layers.0.mlp.linear_fc1.factor_out" in found["names"]
        assert found["sparse"] and all(found["sparse"])  # on from the start, without dense steps
        assert 5 < found["loss"] < 7 and 5 < found["swiglu"] < 7  # ln 256 = 5.5, untrained
        assert found["independent"] == built()[0]["independent"] != found["loss"]


def test_dense_steps_follow_megatrons_iterations():
    """Forward in training, and then evaluation, of iterations 0, 1, 2, 7 and, as after a rollback, 1."""
    assert built()[0]["by iteration"] == [False, False, False, False, True, True, True, True, False, False]


def test_arguments_that_cannot_be_followed_are_refused():
    names = ("--reset-attention-mask=True", "--position-embedding-type=", "low_rank.rank=65")
    names += ("ffn_activation='swiglu': 2:4", "activation_func='gelu'", "attention_backend='flash'")
    names += ("--sparsity-backward='split': not supported with --ffn", "low_rank.rank=18: does not split into")
    refused = built()[0]["refused"]
    assert len(refused) == len(names)
    for name, message in zip(names, refused):
        assert message.startswith(name) and "\n" not in message


@pytest.mark.parametrize("variant", BETWEEN)
def test_context_parallel_equals_whole_sequences(variant):
    """Losses of three steps within 2e-5: sums in another order, and now and then a swapped pair in a 2:4 group."""
    whole, cut = _curves()[variant]
    assert cut == pytest.approx(whole, rel=2e-5)
    assert abs(whole[0] - whole[2]) > 1e-3


@lru_cache
def _curves() -> dict:
    return run_ranks(2, context_parallel, timeout=300.0)[0]


def test_megatrons_mlp_over_our_linears_is_sparse_or_refused():
    message, sparse = run_ranks(2, mlp_of_megatron, timeout=300.0)[0]
    assert "Megatron's own MLP" in message and sparse
