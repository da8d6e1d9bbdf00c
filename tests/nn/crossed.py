"""On one rank of a pool: a Megatron layer and one of `elas.nn` with the same weights compute the same."""

import torch

KINDS = {
    "low rank": ({}, {}),
    "biases": ({}, {"bias": True}),
    "cola": ({"low_rank.kind": "cola", "low_rank.activation": "silu"}, {"init": "cola", "between": "silu"}),
    "swiglu": ({"model.activation": "swiglu", "sparsity.kind": "none"}, {"activation": "swiglu"}),
    "full rank": ({"low_rank.kind": "none"}, {}),
    "full rank swiglu": (
        {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none"},
        {"activation": "swiglu", "bias": True},
    ),
}


def differences() -> dict[str, tuple[list[str], float]]:
    """By kind: names that the two state dicts do not share, and the largest difference of their outputs."""
    import elas
    from elas.config import load_config
    from elas.model.spec import block_spec
    from elas.model.transformer_config import transformer_config
    from elas.nn import LowRankFFN, SparseFFN
    from elas.parallel import initialize

    elas.prepare()
    initialize(load_config(None).parallel, seed=1)
    found = {}
    for kind, (overrides, more) in KINDS.items():
        values = {"model.hidden_size": 64, "model.ffn_hidden_size": 128, "low_rank.rank": 8, "sparsity.dense_steps": 0}
        config = load_config("60m", {**values, "train.dtype": "float32", **overrides})
        megatron = transformer_config(config)
        megatron.add_bias_linear = more.get("bias", False)
        theirs = block_spec(megatron).layer_specs[0].submodules.mlp(config=megatron)
        full = config.low_rank.kind == "none"
        ours = SparseFFN(64, 128, **more) if full else LowRankFFN(64, 128, 8, **more)
        for name, parameter in ours.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        apart = set(ours.state_dict()) ^ {n for n in theirs.state_dict() if "_extra_state" not in n}
        x = torch.randn(5, 2, 64)
        y, bias = theirs(x)
        found[kind] = sorted(apart), float((ours(x) - (y if bias is None else y + bias)).abs().max())
    return found
