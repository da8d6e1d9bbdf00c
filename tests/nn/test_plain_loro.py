"""LORO as a plain optimizer: its steps by formula, its cycle, saving; and the observer in one call."""

import copy

import pytest
import torch
from torch import nn

from elas.errors import ConfigError, UserError
from elas.nn import LORO, LowRankFFN, LowRankLinear, Relu24Options, observe

pytestmark = pytest.mark.any_device


def model_and_batch():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(12, 8, 3), nn.LayerNorm(8), LowRankFFN(8, 16, 2), nn.Linear(8, 5))
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    return model, x


def backward(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.item()


def moments(grads, beta1=0.9, beta2=0.95):
    """m / (√v + eps) after these gradients, and the correction of the step size."""
    m = v = 0.0
    for g in grads:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    t = len(grads)
    return m / (v.sqrt() + 1e-8), (1 - beta2**t) ** 0.5 / (1 - beta1**t)


def test_approximate_steps_are_their_formula():
    model, x = model_and_batch()
    optimizer = LORO(model, lr=0.01, weight_decay=0.1, exact_every=None)
    watched = {"0.factor_in": 3 / 8, "2.linear_fc1.factor_out": 2 / 8, "3.weight": 1.0, "1.weight": 1.0}
    grads = {name: [] for name in watched}
    want = {name: model.get_parameter(name).detach().clone() for name in watched}
    for _ in range(3):
        backward(model, x)
        for name, c in watched.items():
            grads[name].append(model.get_parameter(name).grad.clone())
            direction, correction = moments(grads[name])
            want[name] -= 0.01 * correction * c * direction
            want[name] *= 1 if name == "1.weight" else 1 - 0.01 * 0.1
        optimizer.step()
    for name in watched:  # fp32, the same operations in another order
        torch.testing.assert_close(model.get_parameter(name).detach(), want[name], rtol=1e-5, atol=1e-6)


def test_an_exact_step_is_the_truncated_retraction():
    """By full SVDs in fp64: W - lr·P(G) cut to rank r, P the projection on the tangent space; factors balanced."""
    torch.manual_seed(0)
    model = LowRankLinear(12, {"a": 9, "b": 7}, 3)
    x = torch.randn(20, 12)
    optimizer = LORO(model, lr=0.02, exact_every=1)
    sum(y.square().mean() for y in model(x)).backward()
    want = []
    for number, out in enumerate(model.output_factors):
        m, n = out.detach().double(), model.factor_in.detach()[number * 3 : number * 3 + 3].T.double()
        d_m, _ = moments([out.grad.double()])
        d_n, correction = moments([model.factor_in.grad[number * 3 : number * 3 + 3].T.double()])
        u, v = torch.linalg.qr(m)[0], torch.linalg.qr(n)[0]
        ut_g = torch.linalg.inv(u.T @ m).T @ d_n.T
        gv = d_m @ torch.linalg.inv(v.T @ n)
        k0 = ut_g @ v
        step = u @ k0 @ v.T + u @ (ut_g - k0 @ v.T) + (gv - u @ (u.T @ gv)) @ v.T
        a, sigma, b = torch.linalg.svd(m @ n.T - 0.02 * correction * step)
        want.append(a[:, :3] * sigma[:3] @ b[:3])
    optimizer.step()
    assert optimizer.not_taken == 0
    for number, out in enumerate(model.output_factors):
        m, n = out.detach(), model.factor_in.detach()[number * 3 : number * 3 + 3].T
        torch.testing.assert_close((m @ n.T).double(), want[number], rtol=1e-4, atol=1e-5)  # fp32 against fp64
        torch.testing.assert_close(m.T @ m, n.T @ n, rtol=1e-4, atol=1e-5)
    assert all(float(state["step"]) == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("refresh", ("with_exact", "only", "none"))
def test_the_cycle_resumes_from_a_state_dict(refresh):
    model, x = model_and_batch()
    optimizer = LORO(model, lr=0.01, exact_every=3, refresh=refresh)
    losses = [backward(model, x)]
    for step in range(1, 8):
        optimizer.step()
        left = all(state["exp_avg"].any() for state in optimizer.state.values())
        assert left == (refresh == "none" or step % 3 != 0)
        if step == 4:
            twin = copy.deepcopy(model)
            other = LORO(twin, lr=0.5, exact_every=3, refresh=refresh)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step > 4:
            other.step()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
        losses.append(backward(model, x))
        if step >= 4:
            backward(twin, x)
    assert losses[-1] < 0.9 * losses[0]


def test_a_pair_without_full_rank_makes_the_approximate_step():
    torch.manual_seed(0)
    model = LowRankLinear(12, 9, 3)
    with torch.no_grad():
        model.factor_out[:, 1] = model.factor_out[:, 0]
    before = model.factor_out.detach().clone()
    optimizer = LORO(model, lr=0.01, exact_every=1)
    model(torch.randn(5, 12)).square().mean().backward()
    optimizer.step()
    assert optimizer.not_taken == 1
    assert torch.isfinite(model.factor_out).all()
    assert not torch.equal(model.factor_out, before)


def test_layers_replaced_under_it_are_refused():
    model, x = model_and_batch()
    optimizer = LORO(model)
    backward(model, x)
    optimizer.step()
    model[2].linear_fc1 = LowRankLinear(8, 16, 2)
    backward(model, x)
    with pytest.raises(ConfigError, match=r"model='Sequential': .*other parameters than when LORO was created") as said:
        optimizer.step()
    assert "\n" not in str(said.value)
    LORO(model).step()


REFUSED = {
    "no low rank": (lambda: LORO(nn.Linear(4, 4)), "model='Linear': .*AdamW"),
    "cola": (lambda: LORO(nn.Sequential(LowRankLinear(8, 8, 4, activation="silu"))), r"model\.0=.*non-linearity"),
    "every": (lambda: LORO(LowRankLinear(8, 8, 4), exact_every=0), "exact_every=0: .*of steps such as 500, or None"),
    "parameters": (
        lambda: LORO(LowRankLinear(8, 8, 4).parameters()),
        "model='generator': .*the torch.nn.Module itself",
    ),
    "list": (lambda: LORO([LowRankLinear(8, 8, 4)]), "model='list': is not a model"),
    "refresh": (lambda: LORO(LowRankLinear(8, 8, 4), refresh="always"), "refresh='always': "),
    "lr": (lambda: LORO(LowRankLinear(8, 8, 4), lr=-1.0), "lr=-1.0: "),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_observe_counts_what_is_there():
    torch.manual_seed(0)
    ffn = LowRankFFN(8, 16, 4)
    model = nn.Sequential(ffn, nn.LayerNorm(8), LowRankFFN(8, 16, 4, options=Relu24Options(sparse=False)))
    x = torch.randn(50, 8)
    with observe(model) as seen:
        y = model(x)
    assert torch.equal(y, model(x))
    z = x @ ffn.linear_fc1.factor_in.T @ ffn.linear_fc1.factor_out.T
    assert seen["layers"]["sparsity"][0] == pytest.approx(float((z <= 0).float().mean()), abs=1e-5)
    nonzero = (z > 0).view(-1, 4).sum(-1)
    dropped = float((nonzero - 2).clamp_min(0).sum() / nonzero.sum())
    assert seen["layers"]["dropped"] == [pytest.approx(dropped, abs=1e-5), 0]
    assert seen["mask_flips"] is None
    with torch.no_grad():
        ffn.linear_fc1.factor_in.neg_()
    with observe(model) as seen:
        model(x)
    assert seen["layers"]["mask_flips"][0] > 0.3  # what was kept is negative now
    with pytest.raises(UserError, match="no squared ReLU"), observe(nn.Linear(2, 2)):
        pass


def test_observe_refuses_what_it_would_not_count():
    ffn = LowRankFFN(8, 16, 4)
    for tokens in (0, -5, 2.5, True):
        with pytest.raises(ConfigError, match=f"^tokens={tokens}: .*; give a number of tokens"), observe(ffn, tokens):
            pass
    for model in (nn.Linear(2, 2), LowRankFFN(8, 16, 4, activation="swiglu"), ffn.parameters()):
        with pytest.raises(ConfigError, match=rf"^model='{type(model).__name__}': ") as said, observe(model):
            pass
        assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="inside the block"), observe(ffn):
        pass


def test_observe_sees_a_compiled_model_whole():
    """With fullgraph, so without a graph break; three graphs: without a look, at the first look, at the next ones."""
    torch.manual_seed(0)
    plain = nn.Sequential(LowRankFFN(8, 16, 4), LowRankFFN(8, 16, 4))
    torch._dynamo.reset()
    graphs, stats = [], torch._dynamo.utils.counters["stats"]
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)
    before = stats["unique_graphs"]
    for _ in range(4):
        x = torch.randn(40, 8)
        compiled(x)
        found = []
        for model in (plain, compiled):
            with observe(model, tokens=16) as seen:
                model(x)
            found.append(seen)
        assert found[0] == found[1]
        graphs.append(stats["unique_graphs"] - before)
    assert graphs[-1] == 3
