"""`Again`: tensors that autograd does not keep come back with the same values, once, and only when they are needed."""

import weakref

import pytest
import torch

from elas.model.recompute import Again, Remembers


class Counted:
    """Squares and cubes of a leaf, computed again on demand."""

    def __init__(self):
        self.x = torch.arange(1.0, 7.0).view(2, 3).requires_grad_()
        self.times = 0

    def compute(self):
        return self.x**2, self.x**3

    def again(self):
        self.times += 1
        assert not torch.is_grad_enabled()
        return self.compute()


@pytest.fixture
def counted():
    return Counted()


def product(counted, again=None):
    a, b = counted.compute()
    if again is None:
        return a.t() @ b, weakref.ref(a.untyped_storage())
    again.drop(a, b)
    with again.hooks():
        return a.t() @ b, weakref.ref(a.untyped_storage())


def test_same_gradient_and_computed_once(counted):
    out, _ = product(counted)
    out.sum().backward()
    expected, counted.x.grad = counted.x.grad, None
    out, _ = product(counted, Again(counted.again))
    assert counted.times == 0
    out.sum().backward()
    assert torch.equal(counted.x.grad, expected) and counted.times == 1


def test_nothing_keeps_the_tensor(counted):
    x = counted.x

    def forward(again):
        a = x.exp()  # saves its output
        if again is None:
            return (a * 3.0).sum(), weakref.ref(a)
        b = x * 2.0
        again.drop(b)
        with again.hooks():
            return (b * b).sum(), weakref.ref(b)

    _, kept = forward(Again(lambda: (x * 2.0,)))
    assert kept() is None


def test_twice_with_a_retained_graph(counted):
    out, _ = product(counted, Again(counted.again))
    out.sum().backward(retain_graph=True)
    first = counted.x.grad.clone()
    out.sum().backward()
    assert torch.equal(counted.x.grad, 2 * first) and counted.times == 2


def test_a_tensor_saved_several_times_and_views(counted):
    x = counted.x
    again = Again(lambda: (x * 2.0,))
    b = x * 2.0
    again.drop(b)
    with again.hooks():
        out = (b[1:] * b[:1]).sum() + (b.t() @ b).sum()
    out.backward()
    got, x.grad = x.grad, None
    b = x * 2.0
    ((b[1:] * b[:1]).sum() + (b.t() @ b).sum()).backward()
    assert torch.equal(got, x.grad)


def test_other_tensors_are_kept_as_they_are(counted):
    again = Again(counted.again)
    y = torch.ones(2, 3, requires_grad=True)
    with again.hooks():
        (y * y * counted.x).sum().backward()
    assert counted.times == 0 and torch.equal(y.grad, 2 * counted.x)


def test_a_module_remembers_once_and_only_with_gradients():
    module = Remembers()
    x = torch.ones(2)
    module.remember(x)
    assert module.recall() is None
    module.remembers = True
    module.remember(x)
    assert torch.equal(module.recall(), x) and module.recall() is None
    with torch.no_grad():
        module.remember(x)
    assert module.recall() is None
