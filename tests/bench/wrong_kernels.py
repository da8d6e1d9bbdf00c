"""Kernels for `ffn_core` that are wrong in one way each, and their registration."""

import contextlib

import torch
from torch.nn.functional import linear

from elas.kernels.relu2_24 import Implementation, register, registry


@contextlib.contextmanager
def fused_kernel(core):
    """A kernel that `auto` picks for fused memory."""
    register(Implementation("injected", "fused", core, lambda device, dtype: None, priority=10**6))
    try:
        yield
    finally:
        registry.unregister("injected", "fused")


def wrong_value(u, m_up, n_down, options):
    """Not pruned."""
    return linear(linear(u, m_up).relu().square(), n_down)


def wrong_gradient(u, m_up, n_down, options):
    """Right values, gradient straight through the mask."""
    a = linear(u, m_up).relu().square()
    groups = a.detach().unflatten(-1, (-1, 4))
    keep = torch.zeros_like(groups).scatter(-1, groups.topk(2).indices, 1.0).flatten(-2)
    return linear(a + (a * keep - a).detach(), n_down)


def wrong_tokens(u, m_up, n_down, options):
    """Right but for the gradient of a factor, to which a token that has none adds."""

    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx, m):
            return m.clone()

        @staticmethod
        def backward(ctx, dm):
            return dm * 1.001

    return registry.implementations("eager")[0].core(u, Leak.apply(m_up), n_down, options)
