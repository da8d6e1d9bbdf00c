"""The core attention equals softmax(q kᵀ/√hn) v under a causal mask, and never holds an s × s matrix.

Legend: s sequence, b batch, np query heads, ng key/value heads, hn head dimension.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.utils._python_dispatch import TorchDispatchMode

from elas.errors import UserError
from elas.model.attention import SdpaCoreAttention

S, B, NP, HN = 256, 2, 4, 8  # s·s a head is 8 times what q, k or v have


PLAIN = dict(
    attention_dropout=0.0,
    softmax_type="vanilla",
    window_size=None,
    window_attn_skip_freq=None,
    context_parallel_size=1,
)


def core(scale: float | None = None, layer: int = 1, **config) -> SdpaCoreAttention:
    config = SimpleNamespace(**PLAIN | config)
    return SdpaCoreAttention(config, layer, AttnMaskType.causal, "self", softmax_scale=scale)


def inputs(ng: int, s: int = S, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(s, B, heads, HN) for heads in (NP, ng, ng)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(query, key, value, scale=None, left=None, sink=False) -> torch.Tensor:
    """By the definition, in fp64, one query head at a time; `left`: sliding window; `sink`: 1 more to divide by."""
    heads = []
    for n in range(NP):
        q = query[:, :, n].double()
        k, v = (x[:, :, n * x.shape[2] // NP].double() for x in (key, value))
        scores = torch.einsum("sbh,tbh->bst", q, k) * (HN**-0.5 if scale is None else scale)
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        if left is not None:
            later |= torch.ones(scores.shape[-2:]).tril(-left - 1).bool()
        weights = scores.masked_fill(later, float("-inf")).exp()
        heads.append(torch.einsum("bst,tbh->sbh", weights / (weights.sum(-1, keepdim=True) + sink), v))
    return torch.cat(heads, dim=-1)


VARIANTS = {
    "causal": ({}, {}),
    "window": ({"window_size": (5, 0)}, {"left": 5}),
    "window of 0 back": ({"window_size": (0, 0)}, {"left": 0}),
    "endless window": ({"window_size": (-1, 0)}, {}),
    "window in other layers only": ({"window_size": (5, 0), "window_attn_skip_freq": 1}, {}),
    "off-by-one": ({"softmax_type": "off-by-one"}, {"sink": True}),
    "window, off-by-one": ({"window_size": (5, 0), "softmax_type": "off-by-one"}, {"left": 5, "sink": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("ng", "scale"), [(4, None), (2, 0.5), (1, None)])
@pytest.mark.parametrize("s", [1, 7, S])
def test_equals_plain_attention(variant, ng, scale, s):
    """fp32 against fp64: 1e-5 of the largest value, for sums of up to 256 terms at 6e-8 each."""
    config, formula = VARIANTS[variant]
    ours, theirs = inputs(ng, s), inputs(ng, s)
    out, expected = core(scale, **config)(*ours), plain(*theirs, scale, **formula)
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


def test_the_last_queries_see_all_keys():
    """As with a cache of keys: fewer queries than keys are the last ones."""
    query, key, value = inputs(2, 9)
    whole = plain(query, key, value)
    for n in (1, 4):
        assert (core()(query[-n:], key, value) - whole[-n:]).abs().max() < 1e-5


def test_dropout_keeps_the_mean():
    """Off in evaluation; in training the mean of many draws is the value itself: 4σ of 2000 draws at p = 0.2."""
    query, key, value = (x.detach() for x in inputs(4, 4))
    dropped = core(attention_dropout=0.2)
    wanted = plain(query, key, value)
    draws = torch.stack([dropped(query, key, value) for _ in range(2000)]).double()
    assert draws.std(0).max() > 0.1
    error = (draws.mean(0) - wanted).abs() / (draws.std(0) / 2000**0.5).clamp_min(1e-6)
    assert error.max() < 5  # of 128 values
    assert torch.equal(dropped.eval()(query, key, value), core()(query, key, value))


def test_only_the_causal_mask_is_taken():
    query, key, value = inputs(NP, 8)
    causal = torch.ones(8, 8).triu(1).bool()[None, None].repeat(B, 1, 1, 1)
    assert torch.equal(core()(query, key, value, causal), core()(query, key, value))
    documents = causal.clone()
    documents[:, :, 4:, :4] = True
    for mask in (documents, ~causal, causal[..., :4], causal.float()):
        with pytest.raises(UserError, match="--no-create-attention-mask-in-dataloader"):
            core()(query, key, value, mask)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="causal"):
        SdpaCoreAttention(SimpleNamespace(), 1, AttnMaskType.padding, "self")
    with pytest.raises(ValueError, match="causal"):
        SdpaCoreAttention(SimpleNamespace(), 1, AttnMaskType.causal, "cross")
    for extra in ("attention_bias", "packed_seq_params"):
        with pytest.raises(UserError, match="neither a bias nor packed"):
            core()(*inputs(NP), **{extra: torch.zeros(1)})
