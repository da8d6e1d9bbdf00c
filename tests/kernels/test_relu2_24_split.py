"""The feature-wise backward: against loops over features and groups of tokens, in fp64."""

import dataclasses

import pytest
import torch
from support.relu2_24_oracle import exact_inputs, order, rms_ratio

from elas import accelerator
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, ffn_core, relu2_24
from elas.kernels.relu2_24.plain.split import dense_features, token_mask, token_order

pytestmark = pytest.mark.any_device

SPLIT = Relu24Options(ffn_memory="eager", backward="split")
EXACT = dataclasses.replace(SPLIT, backward="dense")


def gradients(u, m_up, n_down, dv, options):
    v = ffn_core(u, m_up, n_down, options)
    return (v.detach(), *torch.autograd.grad(v, (u, m_up, n_down), dv))


def written_out(u, m_up, n_down, dv):
    """dm_up and dn_down by the recipe, one feature, one group of four tokens at a time."""
    u, m_up, n_down, dv = (x.detach().double() for x in (u, m_up, n_down, dv))
    rho = (u @ m_up.T).clamp_min(0)
    tokens, features = rho.shape
    for token in range(tokens):
        for start in range(0, features, 4):
            for lane in order(rho[token, start : start + 4].tolist())[2:]:
                rho[token, start + lane] = 0
    counts = (rho != 0).sum(0).tolist()
    densest = sorted(range(features), key=lambda j: (-counts[j], j))[: features - int(0.95 * features)]
    permuted = token_order(tokens, torch.device("cpu")).tolist()
    dz, s = 2 * rho * (dv @ n_down), rho**2
    for feature in set(range(features)) - set(densest):
        for start in range(0, tokens, 4):
            group = permuted[start : start + 4]
            values = [float(rho[token, feature]) for token in group] + [0.0] * (4 - len(group))
            for place in order(values)[2:]:
                if place < len(group):
                    dz[group[place], feature] = s[group[place], feature] = 0
    return dz.T @ u, dv.T @ s


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)))
@pytest.mark.parametrize("tokens", (1, 2, 3, 4, 30, 33))
def test_the_recipe_written_out(tokens, dtype, tolerance):
    args = exact_inputs(tokens, 8, 60, 6, dtype)
    v, du, dm_up, dn_down = gradients(*args, SPLIT)
    exact = gradients(*args, EXACT)
    assert torch.equal(v, exact[0]) and rms_ratio(du, exact[1]) < tolerance
    for got, want in zip((dm_up, dn_down), written_out(*args), strict=True):
        assert got.dtype == dtype and rms_ratio(got, want) < tolerance
    if tokens > 4:
        assert rms_ratio(dn_down, exact[3]) > 0.01  # it does prune


def test_it_is_exact_where_there_is_nothing_to_prune():
    """Two tokens: no group of four tokens holds more than two values. And before the dense steps are over."""
    args = exact_inputs(2, 8, 60, 6, torch.float64)
    for got, want in zip(gradients(*args, SPLIT), gradients(*args, EXACT), strict=True):
        assert rms_ratio(got, want) < 1e-14
    args = exact_inputs(30, 8, 60, 6, torch.float64)
    dense = dataclasses.replace(SPLIT, sparse=False), dataclasses.replace(EXACT, sparse=False)
    for got, want in zip(gradients(*args, dense[0]), gradients(*args, dense[1]), strict=True):
        assert rms_ratio(got, want) < 1e-14


def test_five_percent_of_features_stay_dense_the_rest_is_2_of_4():
    rho = torch.randn(64, 100, dtype=torch.float64).relu_()
    rho[:, 7] = rho[:, 93] = 1.0
    dense = dense_features(rho)
    assert dense.sum() == 5 and dense[7] and dense[93]
    groups = token_mask(rho)[token_order(64, rho.device)].view(16, 4, 100).sum(1)
    assert (groups[:, dense] == 4).all() and (groups[:, ~dense] == 2).all()


def test_the_order_of_tokens_is_fixed_and_mixes_neighbours():
    token_order.cache_clear()
    first = token_order(4096, torch.device("cpu")).clone()
    token_order.cache_clear()
    assert torch.equal(first, token_order(4096, torch.device("cpu")))
    assert (first.view(-1, 4).diff(dim=1).abs() < 16).float().mean() < 0.02


def test_no_tokens_and_a_nan():
    u, m_up, n_down, _ = exact_inputs(8, 8, 60, 6, torch.float32)
    v = ffn_core(u[:0], m_up, n_down, SPLIT)
    grads = torch.autograd.grad(v, (m_up, n_down), torch.zeros(0, 6))
    assert v.shape == (0, 6) and all((grad == 0).all() for grad in grads)
    bad = u.detach().clone()
    bad[3, 2] = float("nan")
    v, _, dm_up, dn_down = gradients(bad.requires_grad_(), m_up, n_down, torch.ones(8, 6), SPLIT)
    assert v[3].isnan().all() and dm_up.isnan().any() and dn_down.isnan().any()


def test_torch_compile_takes_it_whole():
    accelerator.prepare()
    u, m_up, n_down, dv = exact_inputs(33, 8, 60, 6, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: ffn_core(*args, SPLIT), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(u, m_up, n_down), (u, m_up, n_down), dv)
    for one, other in zip(got, gradients(u, m_up, n_down, dv, SPLIT)[1:], strict=True):
        assert rms_ratio(one, other) < 1e-6
    how = 1, True, "magnitude", "masked", 1.0, "eager", "split", "auto"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.elas.relu2_24_core, (u, m_up, n_down, *how), test_utils=tests)


def test_what_it_cannot_do_is_refused():
    for change in ({"ffn_memory": "fused"}, {"method": "soft_threshold"}, {"gradient": "ste"}):
        with pytest.raises(ConfigError, match=f"^backward=.*; set {next(iter(change))}="):
            dataclasses.replace(SPLIT, **change)
    with pytest.raises(ConfigError, match="no weight gradients"):
        relu2_24(torch.randn(2, 8), SPLIT)
    with pytest.raises(ConfigError, match="computes the dense backward pass only"):
        ffn_core(*exact_inputs(4, 8, 20, 6, torch.float32)[:3], SPLIT, "reference")
