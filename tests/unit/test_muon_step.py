"""Muon's step of one matrix, against the iteration on whole matrices and against torch's own optimizer."""

import pytest
import torch

from elas.optim.muon import (
    COEFFICIENTS,
    apply_step,
    batches,
    largest_by_squaring,
    matrix_steps,
    orthogonalized,
    spectral_norms,
)

pytestmark = pytest.mark.any_device

SHAPES = [(64, 16), (16, 64), (40, 40), (300, 8), (7, 1)]


def matrix_step(u: torch.Tensor, *, lr: float, hidden_size: int, divisor: float = 1.0) -> torch.Tensor:
    return matrix_steps([u], lr=lr, steps=5, hidden_size=hidden_size, divisors=[divisor])[0]


def iterated(u: torch.Tensor, steps: int) -> torch.Tensor:
    """The definition, in fp64."""
    a, b, c = COEFFICIENTS
    x = u.double() / u.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_the_iteration_is_that_of_whole_matrices(shape, condition):
    """Also of badly conditioned ones, of which the Gram matrix has the square: 1e-9 of singular values about 1."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, -torch.tensor(condition).log10().item(), min(shape), dtype=torch.float64)) @ v
    found = orthogonalized(x, 5)
    assert found.shape == shape and found.dtype == torch.float64
    assert (found - iterated(x, 5)).abs().max() <= 1e-9


def test_singular_values_become_about_one():
    torch.manual_seed(0)
    x = torch.randn(4, 96, 24)
    values = torch.linalg.svdvals(orthogonalized(x, 5))
    assert values.min() > 0.5 and values.max() < 1.3
    assert not orthogonalized(torch.zeros(3, 5), 5).any()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_step_is_that_of_torch(shape):
    """torch.optim.Muon iterates in bf16, so entries of a step differ by some percent of its size."""
    torch.manual_seed(0)
    start, grad = torch.randn(shape), torch.randn(shape)
    weight = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    weight.grad = grad.clone()
    theirs.step()
    u = grad + 0.95 * (1 - 0.95) * grad  # its momentum is an average: the direction is the same but for its length
    ours = start.clone()
    apply_step(ours, matrix_step(u, lr=0.02, hidden_size=256), 0.02 * 0.1)
    step = (ours - start).norm()
    assert (ours - weight.detach()).norm() <= 0.03 * step


def test_the_divisor_is_that_of_spectral_norms():
    torch.manual_seed(0)
    weight, u = torch.randn(20, 6), torch.randn(20, 6)
    norm = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert float(spectral_norms([weight])[0]) == pytest.approx(norm, rel=4e-7 if weight.is_cuda else 1e-10)
    assert not largest_by_squaring(torch.zeros(1, 3, 3, dtype=torch.float64)).any()
    whole, half = (matrix_step(u, lr=0.1, hidden_size=256, divisor=divisor) for divisor in (1.0, 2.0))
    torch.testing.assert_close(half, whole / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", (1e-30, 1.0, 1e30))
@pytest.mark.parametrize("gap", (0.0, 1e-9, 2.0**-24 * 7, 1e-4, 0.5, 1.0))
def test_the_largest_eigenvalue_by_squaring(gap, size):
    """All others lie at the same distance below it, which is the worst case."""
    torch.manual_seed(0)
    base = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q
    values = torch.full((96,), 1 - gap, dtype=torch.float64)
    values[0] = 1
    found = float(largest_by_squaring(((base * values * size) @ base.T)[None])) / size
    assert 1 - 4e-7 <= found <= 1 + 1e-12


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_largest_singular_value_of_a_step_is_the_same_at_every_width(shape):
    torch.manual_seed(0)
    sizes = []
    for times in (1, 2, 4):  # the same shapes of a wider model, its rank in proportion
        u = torch.randn(shape[0] * times, shape[1] * times)
        sizes += spectral_norms([matrix_step(u, lr=0.1, hidden_size=64 * times)])
    torch.testing.assert_close(torch.stack(sizes), sizes[0].expand(3), rtol=0.2, atol=0)


def test_in_batches_as_one_by_one():
    """Matrices of either orientation, and of shapes that only one has."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in [*SHAPES, *SHAPES[::-1], (16, 64)]]
    found: dict[int, torch.Tensor] = {}
    for numbers, batch in batches(matrices, together=True):
        largest = largest_by_squaring(batch.mT @ batch).sqrt()
        for number, result, norm in zip(numbers, orthogonalized(batch, 5), largest, strict=True):
            found[number] = result if result.shape == matrices[number].shape else result.T
            torch.testing.assert_close(norm, spectral_norms([matrices[number]])[0], rtol=4e-7, atol=0)
    assert sorted(found) == list(range(len(matrices)))
    divisors = [1.0 + number for number in found]
    steps = matrix_steps(matrices, lr=0.1, steps=5, hidden_size=256, divisors=divisors)
    for number, (u, step) in enumerate(zip(matrices, steps, strict=True)):
        alone = orthogonalized(u, 5)
        torch.testing.assert_close(found[number], alone, rtol=0, atol=1e-9)
        expected = alone * 0.1 * 0.2 * max(u.shape) ** 0.5 / divisors[number]
        torch.testing.assert_close(step, expected.float(), rtol=1e-6, atol=1e-7)
