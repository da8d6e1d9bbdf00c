"""The exact step against the published formulas and its defining property, in fp64."""

import pytest
import torch

from elas.optim.riemannian import NotTaken, exact_step

pytestmark = pytest.mark.any_device


def problem(o=40, i=28, r=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m, n, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((o, r), (i, r), (o, i)))
    return m, n, g


def published(m, n, d_m, d_n, lr):
    """W after the step as the paper writes it: separate QRs of Y1 and Y2, one SVD of a 2r × 2r matrix."""
    (u, r_m), (v, r_n) = torch.linalg.qr(m), torch.linalg.qr(n)
    gv, utg = d_m @ torch.linalg.inv(r_n), torch.linalg.inv(r_m).T @ d_n.T
    k0 = utg @ v
    q1, k1 = torch.linalg.qr((utg - utg @ v @ v.T).T)
    q2, k2 = torch.linalg.qr(gv - u @ u.T @ gv)
    zero = torch.zeros_like(k0)
    core = torch.cat([torch.cat([r_m @ r_n.T, zero], 1), torch.cat([zero, zero], 1)])
    core = core - lr * torch.cat([torch.cat([k0, k1.T], 1), torch.cat([k2, zero], 1)])
    a, sigma, bt = torch.linalg.svd(core)
    r = m.shape[1]
    root = sigma[:r].sqrt()
    return torch.cat([u, q2], 1) @ a[:, :r] * root, torch.cat([v, q1], 1) @ bt[:r].T * root


@pytest.mark.parametrize("lr", (1e-3, 0.1, 1.0))
def test_it_is_the_published_step(lr):
    m, n, g = problem()
    new_m, new_n = exact_step(m, n, g @ n, g.T @ m, lr)
    their_m, their_n = published(m, n, g @ n, g.T @ m, lr)
    assert torch.allclose(new_m @ new_n.T, their_m @ their_n.T, rtol=0, atol=1e-10)
    signs = torch.sign((new_m * their_m).sum(0))
    assert torch.allclose(new_m, their_m * signs, atol=1e-10) and torch.allclose(new_n, their_n * signs, atol=1e-10)


@pytest.mark.parametrize("shape", ((40, 28, 6), (9, 28, 6), (40, 7, 6), (6, 6, 6)))
def test_step_is_the_truncated_tangent_step_balanced(shape):
    m, n, g = problem(*shape)
    lr, r = 0.05, shape[2]
    u, v = torch.linalg.qr(m)[0], torch.linalg.qr(n)[0]
    tangent = u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T
    a, sigma, bt = torch.linalg.svd(m @ n.T - lr * tangent, full_matrices=False)
    new_m, new_n = exact_step(m, n, g @ n, g.T @ m, lr)
    assert torch.allclose(new_m @ new_n.T, a[:, :r] * sigma[:r] @ bt[:r], rtol=0, atol=1e-10)
    for factor in (new_m, new_n):
        assert torch.allclose(factor.T @ factor, torch.diag(sigma[:r]), rtol=0, atol=1e-10)


def test_any_directions_give_the_truncation_of_what_they_span():
    """Adam's D is no gradient of any W, and the formula is then a heuristic; it still is the paper's."""
    m, n, _ = problem()
    d_m, d_n = torch.sign(problem(seed=1)[0]), torch.sign(problem(seed=2)[1])
    new_m, new_n = exact_step(m, n, d_m, d_n, 0.01)
    their_m, their_n = published(m, n, d_m, d_n, 0.01)
    assert torch.allclose(new_m @ new_n.T, their_m @ their_n.T, rtol=0, atol=1e-10)


def test_signs_are_fixed_and_no_step_balances_only():
    m, n, g = problem()
    new_m, new_n = exact_step(m, n, g @ n, g.T @ m, 0.0)
    assert torch.allclose(new_m @ new_n.T, m @ n.T, rtol=0, atol=1e-10)
    assert (new_m.gather(0, new_m.abs().argmax(0, keepdim=True)) > 0).all()
    again = exact_step(-m, -n, g @ -n, g.T @ -m, 0.0)
    assert torch.allclose(new_m, again[0], atol=1e-10) and torch.allclose(new_n, again[1], atol=1e-10)


def test_what_cannot_be_stepped_says_why():
    m, n, g = problem()
    poor = m.clone()
    poor[:, 3] = poor[:, 1] + poor[:, 2]
    for bad_m, bad_n, name in ((poor, n, "M"), (m, torch.zeros_like(n), "N")):
        with pytest.raises(NotTaken, match=f"{name} has not full rank"):
            exact_step(bad_m, bad_n, g @ n, g.T @ m, 0.1)
    for bad in (float("nan"), float("inf")):
        direction = g @ n
        direction[0, 0] = bad
        with pytest.raises(NotTaken):
            exact_step(m, n, direction, g.T @ m, 0.1)
