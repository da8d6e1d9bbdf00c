"""How many tokens the loss computes logits of at once (`elas.model.head`); imports nothing, so that plans can ask."""

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""fp32 logits of a chunk. Products of fewer tokens would be bound by reading the weight."""
LEAST_TOKENS = 64
SLICE = 4096
"""Rows of the weight's gradient that are added at once in bf16."""


def chunk_tokens(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens of a chunk, for a rank's part of the vocabulary."""
    return max(LEAST_TOKENS, CHUNK_BYTES[device_type] // (4 * vocabulary))
