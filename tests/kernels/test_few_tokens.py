"""The product that reads live rows only, against the dense one."""

import pytest
import torch

from elas.kernels.relu2_24 import Relu24Options, reference
from elas.kernels.relu2_24.cpu import mode_of, operators
from elas.kernels.relu2_24.few_tokens import MOST_LIVE, live_rows, low_rank

OPTIONS = {
    "dense": Relu24Options(sparse=False),
    "magnitude": Relu24Options(sparse=True),
    "soft threshold": Relu24Options(sparse=True, method="soft_threshold", scale=1.5),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "f", "r"), [(1, 64, 16), (2, 132, 33), (5, 20, 1), (1, 4, 300)])
def test_the_product_is_that_of_all_rows(name, dtype, n, f, r):
    options = OPTIONS[name]
    torch.manual_seed(f)
    z, down_t = torch.randn(n, f).to(dtype), (torch.randn(f, r) / f**0.5).to(dtype)
    want = reference.relu2_24(z, options).double() @ down_t.double()
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2  # bf16 rounds s, and the result, to 8 bits
    for got in (live_rows(z, down_t, options), operators().live_rows(z, down_t, mode_of(options), options.scale, None)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_not_a_number_is_seen():
    z = torch.full((1, 8), -1.0)
    z[0, 3] = torch.nan
    assert live_rows(z, torch.ones(8, 2), OPTIONS["magnitude"]).isnan().all()


def test_dead_rows_are_not_read():
    z = torch.tensor([[1.0, -1.0, 2.0, 3.0]] * MOST_LIVE)  # the smallest of the three is pruned
    down_t = torch.tensor([[torch.nan], [torch.nan], [1.0], [1.0]])
    assert live_rows(z, down_t, OPTIONS["magnitude"]).tolist() == [[13.0]] * MOST_LIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "h", "r", "o"), [(1, 64, 16, 96), (4, 33, 40, 7), (2, 300, 1, 5), (9, 1024, 256, 2048)])
def test_a_low_rank_pair_is_the_product_of_both(dtype, n, h, r, o):
    """For one token and several, in C++ and not, with widths that vectors do not divide."""
    torch.manual_seed(h)
    x, first, second = (torch.randn(n, h), torch.randn(r, h) / h**0.5, torch.randn(o, r) / r**0.5)
    x, first, second = x.to(dtype), first.to(dtype), second.to(dtype)
    want = x.double() @ first.double().t() @ second.double().t()
    tolerance = 3e-6 if dtype == torch.float32 else 3e-2  # bf16 rounds the bottleneck, and the result, to 8 bits
    for got in (low_rank(x, first, second), operators().low_rank(x, first, second)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_the_second_factor_may_follow_live_rows():
    torch.manual_seed(0)
    options = OPTIONS["magnitude"]
    for n in (1, 3):
        z, down_t, second = torch.randn(n, 32), torch.randn(32, 8), torch.randn(12, 8)
        torch.testing.assert_close(live_rows(z, down_t, options, second), live_rows(z, down_t, options) @ second.t())


def test_wrong_shapes_are_refused():
    with pytest.raises(RuntimeError, match="low_rank: x"):
        low_rank(torch.ones(1, 4), torch.ones(2, 5), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="factor_out"):
        low_rank(torch.ones(1, 5), torch.ones(2, 5), torch.ones(3, 4))
