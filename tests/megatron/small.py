"""A small model in Megatron-core's hands, built as its own training loop builds it, for every kind of layer we have."""

import torch

SIZES = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 128,
    "vocab_size": 256,
    "seq_length": 32,
}
SMALL = {f"model.{key}": value for key, value in SIZES.items()} | {
    "low_rank.rank": 16,
    "sparsity.dense_steps": 0,
    "train.dtype": "float32",
}
SWIGLU = {"model.activation": "swiglu", "sparsity.kind": "none"}
FULL, COLA = {"low_rank.kind": "none"}, {"low_rank.kind": "cola"}
KINDS = {
    "low rank, fused": {},
    "low rank, compressed": {"sparsity.ffn_memory": "compressed"},
    "low rank, eager": {"sparsity.ffn_memory": "eager"},
    "low rank, swiglu": SWIGLU,
    "cola": {**COLA, **SWIGLU},
    "cola, 2:4 between the factors": {**COLA, "low_rank.activation": "relu2", "model.activation": "swiglu"},
    "cola, 2:4 in the ffn": COLA,
    "full rank": FULL,
    "full rank, swiglu": {**FULL, **SWIGLU},
}


def small(overrides: dict):
    """Our configuration of the small model."""
    from elas.config import load_config

    return load_config(None, {**SMALL, **overrides})


def batch(size: int = 2, seed: int = 5, length: int = SIZES["seq_length"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, int64 `[size, length]`, the same on every rank."""
    drawn = torch.randint(256, (size, length + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of a whole model (no pipeline)."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels).mean()
