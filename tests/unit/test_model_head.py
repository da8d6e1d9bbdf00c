"""The loss without its logits: values and gradients against fp64 autograd, and no tensor of tokens × vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from elas.bench.measure import Memory
from elas.model import head, loss_chunks

N, H, V = 150, 24, 1000


class OneRank:
    """A group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def inputs(dtype=torch.float32, n=N):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, H, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=draw) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(V, (n,), generator=draw)
    weights = torch.rand(n, generator=draw)
    weights[::7], labels[::7] = 0, -1
    return hidden, weight, labels, weights


def reference(hidden, weight, labels, weights):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(hidden @ weight.t(), labels.clamp(min=0), reduction="none")
    total = (losses * weights).sum()
    total.backward()
    return total, hidden.grad, weight.grad, losses.detach()


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(params=[64, 70, 10**6], ids=["chunks of 64", "chunks of 70", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(loss_chunks.CHUNK_BYTES, "cpu", 4 * V * request.param)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_sum_and_gradients(chunks, dtype, bound):
    given = inputs(dtype)
    total, of_hidden, of_weight, _ = reference(*given)
    got = head.LinearCrossEntropy.apply(*given, OneRank())
    (3 * got).backward()
    assert error(got, total) < bound / 10
    assert error(given[0].grad, 3 * of_hidden) < bound
    assert error(given[1].grad, 3 * of_weight) < bound
    assert given[0].grad.dtype == given[1].grad.dtype == dtype
    assert not given[0].grad[::7].any()


def test_losses_of_tokens(chunks):
    hidden, weight, labels, weights = inputs()
    expected = reference(hidden, weight, labels, weights)[-1]
    with torch.no_grad():
        got = head.losses_of_tokens(hidden, weight, labels, OneRank())
    assert error(got[labels >= 0], expected[labels >= 0]) < 1e-6


def test_frozen_weight_and_frozen_hidden():
    given = inputs()
    _, of_hidden, of_weight, _ = reference(*given)
    for index, expected in ((0, of_hidden), (1, of_weight)):
        parts = [x.detach().requires_grad_(i == index) if i < 2 else x for i, x in enumerate(given)]
        head.LinearCrossEntropy.apply(*parts, OneRank()).backward()
        assert error(parts[index].grad, expected) < 1e-6


def test_extreme_logits_stay_finite():
    hidden, weight, labels, weights = inputs()
    total = head.LinearCrossEntropy.apply(1e4 * hidden, weight, labels, weights, OneRank())
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_no_token_no_loss():
    given = inputs(n=0)
    total = head.LinearCrossEntropy.apply(*given, OneRank())
    total.backward()
    assert total == 0 and not given[1].grad.any()


def test_an_ignored_label_with_a_bad_hidden_state_leaves_the_sum_finite():
    hidden, weight, labels, weights = inputs()
    with torch.no_grad():
        hidden[0] = float("nan")  # weight 0
        assert torch.isfinite(head.weighted_sum(hidden, weight, labels, weights, OneRank()))
    assert torch.isfinite(head.weighted_sum(hidden, weight, labels, weights, OneRank()))


def test_a_second_backward_pass_is_refused():
    given = inputs()
    total = head.LinearCrossEntropy.apply(*given, OneRank())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second forward pass"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_chunk_and_the_gradients(dtype, monkeypatch):
    monkeypatch.setitem(loss_chunks.CHUNK_BYTES, "cpu", 64 * 4 * V)
    given = inputs(dtype, n=2048)
    with Memory(torch.device("cpu")) as memory:
        head.LinearCrossEntropy.apply(*given, OneRank()).backward()
    size, logits = dtype.itemsize, 64 * V * (4 if dtype == torch.float32 else 6)
    gradients = 2048 * H * size + V * H * (4 if dtype == torch.float32 else 8)
    assert memory.peak < 1.3 * (logits + gradients)
    assert memory.peak < 0.2 * 2048 * V * 4
