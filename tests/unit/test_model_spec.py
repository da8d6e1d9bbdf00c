"""What Megatron-core asks of us is there: the backend protocol, the provider's signature, a layer's modules."""

import inspect

import pytest
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from support.ranks import run_ranks

from elas.config import load_config
from elas.model.activation import SquaredReLU24
from elas.model.attention import ElasSelfAttention, SdpaCoreAttention
from elas.model.ffn import ElasFFN
from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear
from elas.model.norm import LayerNorm, RMSNorm
from elas.model.provider import make_model_provider
from elas.model.spec import ElasSpecProvider, layer_spec

QUESTIONS = [
    name for name, member in vars(BackendSpecProvider).items() if inspect.isfunction(member) and name[0] != "_"
]


def test_the_protocol_asks_something():
    assert {"column_parallel_linear", "row_parallel_linear", "layer_norm", "core_attention"} <= set(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_provider_answers_the_protocol(question):
    """Each method is our own, with the protocol's parameters in its order."""
    assert question in vars(ElasSpecProvider)
    asked = inspect.signature(getattr(BackendSpecProvider, question)).parameters
    answered = inspect.signature(getattr(ElasSpecProvider, question)).parameters
    assert list(asked) == list(answered)


def test_answers():
    provider = ElasSpecProvider()
    assert provider.column_parallel_linear() is LowRankColumnParallelLinear
    assert provider.row_parallel_linear() is LowRankRowParallelLinear
    assert provider.layer_norm(rms_norm=True) is RMSNorm
    assert provider.core_attention() is SdpaCoreAttention
    assert provider.fuse_layernorm_and_linear() is False
    assert provider.column_parallel_layer_norm_linear() is None
    assert provider.activation_func() is SquaredReLU24
    assert provider.layer_norm(rms_norm=False) is LayerNorm
    full_rank = ElasSpecProvider(low_rank=False)
    assert issubclass(full_rank.column_parallel_linear(), ColumnParallelLinear)
    assert issubclass(full_rank.row_parallel_linear(), RowParallelLinear)
    with pytest.raises(NotImplementedError, match="mixture-of-experts"):
        provider.grouped_mlp_modules(False, False)


def test_layer_spec_is_made_of_our_modules():
    parts = layer_spec(ElasSpecProvider()).submodules
    assert parts.self_attention.module is ElasSelfAttention
    assert parts.self_attention.submodules.linear_qkv is LowRankColumnParallelLinear
    assert parts.self_attention.submodules.linear_proj is LowRankRowParallelLinear
    assert issubclass(parts.mlp, ElasFFN)
    assert parts.mlp.submodules.linear_fc1 is LowRankColumnParallelLinear
    assert parts.mlp.submodules.linear_fc2 is LowRankRowParallelLinear
    assert parts.input_layernorm is parts.pre_mlp_layernorm is RMSNorm


def test_model_provider_has_the_signature_of_megatron():
    """As `get_model` of Megatron-LM core_v0.16 calls it, by these names."""
    parameters = inspect.signature(make_model_provider(load_config())).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {
        "pre_process": True,
        "post_process": True,
        "vp_stage": None,
        "config": None,
        "pg_collection": None,
    }


def provide(pre_process: bool, post_process: bool) -> list[str]:
    from elas import parallel

    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 64}
    config = load_config(None, {"low_rank.rank": 16, **{f"model.{key}": value for key, value in sizes.items()}})
    parallel.initialize(config.parallel, seed=1)
    return [name for name, _ in make_model_provider(config)(pre_process, post_process).named_parameters()]


@pytest.mark.timeout(120)
def test_model_provider_builds_the_part_asked_for():
    ends = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    whole = set(run_ranks(1, provide, True, True)[0])
    assert ends <= whole
    assert set(run_ranks(1, provide, False, False)[0]) == whole - ends
    assert set(run_ranks(1, provide, True, False)[0]) == whole - ends | {"embedding.word_embeddings.weight"}
