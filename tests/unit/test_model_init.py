"""A parameter's first values depend on seed, global name and full shape only, not on the layout."""

import pytest
import torch
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

SMALL = {
    "model.hidden_size": 32,
    "model.num_layers": 4,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 64,
    "model.vocab_size": 64,
    "model.seq_length": 16,
    "low_rank.rank": 8,
    "train.dtype": "float32",
}
MODELS = {
    "low-rank relu2": {},
    "low-rank swiglu": {"sparsity.kind": "none", "model.activation": "swiglu"},
    "cola swiglu": {"low_rank.kind": "cola", "sparsity.kind": "none", "model.activation": "swiglu"},
    "full-rank swiglu": {"low_rank.kind": "none", "sparsity.kind": "none", "model.activation": "swiglu"},
    "tied": {"model.tie_embeddings": True},
}
LAYOUTS = {
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2-sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2-interleaved": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "dp2": (2, {}),
    "tp2-pp2-interleaved": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
}


def parameters(overrides: dict) -> list[tuple[str, int, int | None, int, torch.Tensor]]:
    """This rank's parameters: global name, tensor-parallel rank, split dimension, its stride, values."""
    from elas import parallel
    from elas.config import load_config
    from elas.model.provider import build_chunks
    from elas.model.shards import global_names

    config = load_config(None, {**SMALL, **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    found = []
    for chunk in build_chunks(config):
        for name, p in global_names(chunk).items():
            dim = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
            found.append((name, layout.tp_rank, dim, getattr(p, "partition_stride", 1), p.detach().clone()))
    return found


def whole(ranks: list) -> dict[str, list[torch.Tensor]]:
    """Each parameter put together again from its shards; one tensor for every copy of it among the ranks."""
    shards: dict[str, dict[int, list]] = {}
    for name, tp_rank, dim, stride, values in (entry for rank in ranks for entry in rank):
        shards.setdefault(name, {}).setdefault(tp_rank, []).append((dim, stride, values))
    result = {}
    for name, by_rank in shards.items():
        copies = zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True)
        result[name] = [tensor for copy in copies for tensor in _join(copy)]
    return result


def _join(parts: tuple) -> list[torch.Tensor]:
    dim, stride, _ = parts[0]
    if dim is None:
        return [values for _, _, values in parts]
    pieces = [values.chunk(stride, dim) for _, _, values in parts]  # gate and up in one weight: split each by itself
    return [torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_starts_from_the_same_values(model, layout):
    expected = {name: copies[0] for name, copies in whole(run_ranks(1, parameters, MODELS[model])).items()}
    world, parallel = LAYOUTS[layout]
    found = whole(run_ranks(world, parameters, {**MODELS[model], **parallel}))
    assert found.keys() == expected.keys()
    for name, copies in found.items():
        assert all(torch.equal(copy, expected[name]) for copy in copies), name


def test_names_tell_parameters_apart():
    """Equal shapes in other layers, other seeds: other values. Norms are ones."""
    first = {name: copies[0] for name, copies in whole(run_ranks(1, parameters, {})).items()}
    other = {name: copies[0] for name, copies in whole(run_ranks(1, parameters, {"train.seed": 4321})).items()}
    matrices = {name: value for name, value in first.items() if value.dim() > 1}
    assert len({value.flatten()[0].item() for value in matrices.values()}) == len(matrices)
    assert not any(torch.equal(value, other[name]) for name, value in matrices.items())
    assert all(torch.equal(value, torch.ones_like(value)) for value in first.values() if value.dim() == 1)
    assert sum(name.startswith("decoder.layers.3.") for name in first) == sum(".layers.0." in name for name in first)


def test_factors_have_the_spread_of_their_paper():
    """Low rank: sqrt(2 / (long side + r)); CoLA: (in + out)^(-1/4) / r^(1/4); full rank: init_std. Within 15 %: 4σ."""
    name = "decoder.layers.0.mlp.linear_fc1."
    wide = {"model.hidden_size": 64, "model.ffn_hidden_size": 192, "low_rank.rank": 16}
    for overrides, factor, std in (
        ({}, "factor_in", (2 / (64 + 16)) ** 0.5),
        ({}, "factor_out", (2 / (192 + 16)) ** 0.5),
        ({"low_rank.kind": "cola"}, "factor_in", (64 + 192) ** -0.25 / 16**0.25),
        ({"low_rank.kind": "cola"}, "factor_out", (64 + 192) ** -0.25 / 16**0.25),
        ({"low_rank.kind": "none"}, "weight", 0.02),
    ):
        values = whole(run_ranks(1, parameters, {**wide, **overrides}))[name + factor][0]
        assert float(values.std()) == pytest.approx(std, rel=0.15)
        assert abs(float(values.mean())) < 0.15 * std
