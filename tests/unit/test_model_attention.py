"""The core attention equals softmax(q kᵀ/√hn) v under a causal mask, and never holds an s × s matrix.

Legend: s sequence, b batch, np query heads, ng key/value heads, hn head dimension.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.utils._python_dispatch import TorchDispatchMode

from elas.model.attention import SdpaCoreAttention

S, B, NP, HN = 256, 2, 4, 8  # s·s a head is 8 times what q, k or v have


def core(scale: float | None = None) -> SdpaCoreAttention:
    return SdpaCoreAttention(SimpleNamespace(), 1, AttnMaskType.causal, "self", softmax_scale=scale)


def inputs(ng: int, s: int = S, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(s, B, heads, HN) for heads in (NP, ng, ng)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(query, key, value, scale=None) -> torch.Tensor:
    """By the definition, in fp64, one query head at a time."""
    heads = []
    for n in range(NP):
        q = query[:, :, n].double()
        k, v = (x[:, :, n * x.shape[2] // NP].double() for x in (key, value))
        scores = torch.einsum("sbh,tbh->bst", q, k) * (HN**-0.5 if scale is None else scale)
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        heads.append(torch.einsum("bst,tbh->sbh", scores.masked_fill(later, float("-inf")).softmax(-1), v))
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("ng", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("s", [1, 7, S])
def test_equals_plain_attention(ng, scale, s):
    """fp32 against fp64: 1e-5 of the largest value, for sums of up to 256 terms at 6e-8 each."""
    ours, theirs = inputs(ng, s), inputs(ng, s)
    out, expected = core(scale)(*ours), plain(*theirs, scale)
    assert out.shape == (s, B, NP * HN)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    out.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs))]
    for value, wanted in pairs:
        # At s = 1 the gradients of query and key are 0: there the unit stands in for the largest value.
        assert (value - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1.0)


class LargestTensor(TorchDispatchMode):
    """The most values that any operation below it gave out in one tensor."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


@pytest.mark.parametrize("ng", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_all_scores(ng, dtype):
    """Neither saved for the backward pass nor made on the way: nothing is larger than the queries."""
    query, key, value = inputs(ng, dtype=dtype)
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = core()(query, key, value)
        out.sum().backward()
    assert max(saved) <= query.numel() < S * S
    assert made.values <= query.numel()


def test_the_test_sees_a_matrix_of_all_scores():
    query, key, value = inputs(NP)
    with LargestTensor() as made:
        plain(query, key, value)
    assert made.values >= S * S


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="causal"):
        SdpaCoreAttention(SimpleNamespace(), 1, AttnMaskType.padding, "self")
    with pytest.raises(ValueError, match="causal"):
        SdpaCoreAttention(SimpleNamespace(), 1, AttnMaskType.causal, "cross")
    for extra in ("attention_mask", "attention_bias", "packed_seq_params"):
        with pytest.raises(ValueError, match="no mask"):
            core()(*inputs(NP), **{extra: torch.zeros(1)})
