"""The product that reads live rows only, against the dense one."""

import pytest
import torch

from elas.kernels.relu2_24 import Relu24Options, reference
from elas.kernels.relu2_24.cpu import mode_of, operators
from elas.kernels.relu2_24.live_rows import MOST_TOKENS, live_rows

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
    for got in (live_rows(z, down_t, options), operators().live_rows(z, down_t, mode_of(options), options.scale)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_not_a_number_is_seen():
    z = torch.full((1, 8), -1.0)
    z[0, 3] = torch.nan
    assert live_rows(z, torch.ones(8, 2), OPTIONS["magnitude"]).isnan().all()


def test_dead_rows_are_not_read():
    z = torch.tensor([[1.0, -1.0, 2.0, 3.0]] * MOST_TOKENS)  # the smallest of the three is pruned
    down_t = torch.tensor([[torch.nan], [torch.nan], [1.0], [1.0]])
    assert live_rows(z, down_t, OPTIONS["magnitude"]).tolist() == [[13.0]] * MOST_TOKENS
