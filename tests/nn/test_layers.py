"""The layers alone: values and gradients by formulas in fp64, initial values, and what is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu

from elas.errors import ConfigError
from elas.kernels.relu2_24.pack import keep_mask
from elas.nn import LowRankFFN, LowRankLinear, Relu24Options, SparseFFN

pytestmark = pytest.mark.any_device

DOUBLE = dict(dtype=torch.float64)
CLOSE = dict(rtol=1e-10, atol=1e-10)  # fp64 on both sides


def filled(module: nn.Module) -> nn.Module:
    """With values of order 1 in every parameter, biases too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter.shape[-1] ** 0.5
        )
    return module


def relu2(z: torch.Tensor, sparse: bool = True) -> torch.Tensor:
    return torch.where(keep_mask(z.relu()), z.relu().square(), 0) if sparse else z.relu().square()


def by_formula(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The FFN written with nothing but products, from its parameters."""
    p = dict(ffn.named_parameters())
    sparse = ffn.can_be_sparse

    def project(name: str, x: torch.Tensor, pair: str = "") -> torch.Tensor:
        if f"{name}.weight" in p:
            return linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))
        into = p[f"{name}.factor_in"]
        number = {"": 0, "_gate": 0, "_up": 1}[pair]
        u = linear(x, into[number * 4 : number * 4 + 4])
        if getattr(ffn.linear_fc1, "activation", None) is not None:
            u = silu(u)
        return linear(u, p[f"{name}.factor_out{pair}"], p.get(f"{name}.bias{pair}"))

    if not ffn.gated:
        return project("linear_fc2", relu2(project("linear_fc1", x), sparse))
    if "linear_fc1.weight" in p:
        gate, up = project("linear_fc1", x).chunk(2, -1)
    else:
        gate, up = project("linear_fc1", x, "_gate"), project("linear_fc1", x, "_up")
    return project("linear_fc2", silu(gate) * up)


MADE = {
    "low rank": lambda **more: LowRankFFN(10, 24, 4, **more),
    "low rank, biases": lambda **more: LowRankFFN(10, 24, 4, bias=True, **more),
    "low rank, no 2:4": lambda **more: LowRankFFN(10, 22, 4, options=Relu24Options(sparse=False), **more),
    "compressed": lambda **more: LowRankFFN(10, 24, 4, options=Relu24Options(ffn_memory="compressed"), **more),
    "eager": lambda **more: LowRankFFN(10, 24, 4, options=Relu24Options(ffn_memory="eager"), **more),
    "cola": lambda **more: LowRankFFN(10, 24, 4, init="cola", between="silu", **more),
    "swiglu": lambda **more: LowRankFFN(10, 22, 4, activation="swiglu", bias=True, **more),
    "full rank": lambda **more: SparseFFN(10, 24, **more),
    "full rank, biases": lambda **more: SparseFFN(10, 24, bias=True, **more),
    "full rank swiglu": lambda **more: SparseFFN(10, 22, activation="swiglu", bias=True, **more),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_ffn_is_its_formula(make):
    ffn = filled(make(**DOUBLE))
    x = torch.randn(2, 5, 10, **DOUBLE).requires_grad_()
    leaves = [x, *ffn.parameters()]
    y, want = ffn(x), by_formula(ffn, x)
    torch.testing.assert_close(y, want, **CLOSE)
    dy = torch.randn_like(y)
    for got, truth in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(got, truth, **CLOSE)


def test_linear_is_its_formula():
    x = torch.randn(2, 5, 10, **DOUBLE)
    one = filled(LowRankLinear(10, 7, 3, bias=True, **DOUBLE))
    torch.testing.assert_close(one(x), x @ one.factor_in.T @ one.factor_out.T + one.bias, **CLOSE)
    cola = filled(LowRankLinear(10, 7, 4, activation="relu2", init="cola", **DOUBLE))
    torch.testing.assert_close(cola(x), relu2(x @ cola.factor_in.T) @ cola.factor_out.T, **CLOSE)
    three = filled(LowRankLinear(10, {"q": 8, "k": 2, "v": 2}, 3, bias=True, **DOUBLE))
    q, _, v = three(x)
    torch.testing.assert_close(q, x @ three.factor_in[:3].T @ three.factor_out_q.T + three.bias_q, **CLOSE)
    torch.testing.assert_close(v, x @ three.factor_in[6:].T @ three.factor_out_v.T + three.bias_v, **CLOSE)
    torch.testing.assert_close(three.to_linear()(x), torch.cat(three(x), -1), **CLOSE)


def test_initial_values_have_their_deviation():
    """sqrt(2/(size + r)); 600,000 draws estimate a deviation to 0.1 %, 3 % is far outside."""
    torch.manual_seed(0)
    ffn = LowRankFFN(1000, 4000, 150)
    want = {"1.factor_in": 1000, "1.factor_out": 4000, "2.factor_in": 4000, "2.factor_out": 1000}
    for name, size in want.items():
        std = dict(ffn.named_parameters())[f"linear_fc{name}"].std().item()
        assert std == pytest.approx((2 / (size + 150)) ** 0.5, rel=0.03), name
    cola = LowRankLinear(600, 2000, 100, init="cola")
    assert cola.factor_in.std().item() == pytest.approx(2600**-0.25 * 100**-0.25, rel=0.03)
    before = ffn.linear_fc1.factor_in.clone()
    ffn.reset_parameters()
    assert not torch.equal(before, ffn.linear_fc1.factor_in)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)))
def test_from_linear_is_the_best_of_its_rank(dtype, tolerance):
    torch.manual_seed(0)
    full = nn.Linear(20, 12, dtype=dtype)
    low = LowRankLinear.from_linear(full, 5)
    assert low.factor_in.dtype == dtype
    sigma = torch.linalg.svdvals(full.weight.double())
    error = (low.to_linear().weight.double() - full.weight.double()).square().sum()
    torch.testing.assert_close(error, sigma[5:].square().sum(), rtol=tolerance, atol=0)
    assert low.energy_kept == pytest.approx(float(sigma[:5].square().sum() / sigma.square().sum()), rel=tolerance)
    assert torch.equal(low.bias, full.bias)
    exact = LowRankLinear.from_linear(full.double(), 12)
    x = torch.randn(3, 20, **DOUBLE)
    torch.testing.assert_close(exact(x), full(x), **CLOSE)
    assert exact.energy_kept == pytest.approx(1)
    assert LowRankLinear.from_linear(nn.Linear(20, 12, device="meta"), 5).factor_in.is_meta


def test_frozen_linears_stay_frozen():
    full = nn.Linear(8, 8).eval()
    full.weight.requires_grad_(False)
    low = LowRankLinear.from_linear(full, 4)
    assert {name for name, p in low.named_parameters() if p.requires_grad} == {"bias"} and not low.training
    back = low.to_linear()
    assert not back.weight.requires_grad and back.bias.requires_grad and not back.training
    assert all(p.requires_grad for p in LowRankLinear.from_linear(nn.Linear(8, 8), 4).to_linear().parameters())


def test_copies_and_meta():
    ffn = LowRankFFN(8, 16, 4, bias=True)
    x = torch.randn(3, 8)
    for twin in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn))):
        assert torch.equal(twin(x), ffn(x))
    empty = LowRankFFN(8, 16, 4, bias=True, device="meta")
    assert empty(x.to("meta")).shape == (3, 8)
    real = empty.to_empty(device=x.device)
    real.load_state_dict(ffn.state_dict())
    assert torch.equal(real(x), ffn(x))
    skipped = nn.utils.skip_init(LowRankFFN, 8, 16, 4)
    assert skipped.linear_fc1.factor_in.shape == (4, 8)


REFUSED = {
    "rank": (lambda: LowRankLinear(8, 8, 0), "rank=0: "),
    "bool": (lambda: LowRankLinear(True, 8, 4), "in_features=True: "),
    "width": (lambda: LowRankLinear(8, 8.0, 4), "out_features=8.0: "),
    "no outputs": (lambda: LowRankLinear(8, {}, 4), "out_features={}: "),
    "one of the outputs": (lambda: LowRankLinear(8, {"q": 4, "k": -4}, 4), "out_features=-4: "),
    "init": (lambda: LowRankLinear(8, 8, 4, init="xavier"), "init='xavier': .* lowrank | cola"),
    "activation": (lambda: LowRankLinear(8, 8, 4, activation="gelu"), "activation='gelu': "),
    "groups": (lambda: LowRankFFN(8, 18, 4), "ffn_hidden_size=18: .*multiple of 4, such as 20"),
    "groups between": (lambda: LowRankLinear(8, 8, 6, activation="relu2"), "rank=6: .*such as 8"),
    "hidden": (lambda: SparseFFN(0, 16), "hidden_size=0: "),
    "gated 2:4": (lambda: LowRankFFN(8, 16, 4, activation="swiglu", options=Relu24Options()), "options=.*leave it out"),
    "dict": (lambda: LowRankFFN(8, 16, 4, options={"sparse": True}), "options=.*Relu24Options"),
    "dense of nothing": (lambda: LowRankFFN(8, 16, 4, activation="swiglu", dense_steps=5), "dense_steps=5: "),
    "share": (lambda: LowRankFFN(8, 16, 4, dense_steps=0.2), "dense_steps=0.2: "),
    "rank of an SVD": (lambda: LowRankLinear.from_linear(nn.Linear(8, 6), 7), "rank=7: .*6 or less"),
    "no linear": (lambda: LowRankLinear.from_linear(nn.Identity(), 2), "linear='Identity': "),
    "fp16": (lambda: LowRankFFN(8, 16, 4, dtype=torch.float16), "dtype=torch.float16: relu² overflows .*bfloat16"),
    "fp16, full rank": (lambda: SparseFFN(8, 16, dtype=torch.float16), "dtype=torch.float16: "),
    "fp16 between": (lambda: LowRankLinear(8, 8, 4, activation="relu2", dtype=torch.float16), "dtype=torch.float16: "),
    "fp16 of a linear": (
        lambda: LowRankLinear.from_linear(nn.Linear(8, 8, dtype=torch.float16), 4, activation="relu2"),
        "dtype=torch.float16: ",
    ),
    "whole numbers": (lambda: LowRankLinear(8, 8, 4, dtype=torch.int32), "dtype=torch.int32: "),
    "dtype in words": (lambda: SparseFFN(8, 16, dtype="bf16"), "dtype='bf16': "),
    "no kernel": (lambda: LowRankFFN(8, 16, 4, implementation="cuda"), r"implementation='cuda': .*use auto \| "),
    "kernel of another memory": (
        lambda: SparseFFN(8, 16, options=Relu24Options(ffn_memory="eager"), implementation="triton"),
        r"implementation='triton': does not serve ffn_memory=eager; use auto \| reference",
    ),
    "kernel of another backward": (
        lambda: SparseFFN(8, 16, options=Relu24Options(ffn_memory="eager"), implementation="split"),
        "implementation='split': computes the split backward pass only; ",
    ),
    "kernel of a gate": (
        lambda: SparseFFN(8, 16, activation="swiglu", implementation="torch"),
        "implementation='torch'",
    ),
    "bias": (lambda: LowRankFFN(8, 16, 4, bias="no"), "bias='no': is not a boolean; give True or False"),
    "bias of a linear": (lambda: LowRankLinear(8, 16, 4, bias=1), "bias=1: "),
    "cola merged": (lambda: LowRankLinear(8, 8, 4, activation="silu").to_linear(), "activation="),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_dense_steps_are_counted():
    torch.manual_seed(0)
    from elas.nn import count_steps

    ffn = LowRankFFN(8, 16, 4, dense_steps=2)
    x = torch.randn(6, 8)
    with pytest.raises(ConfigError, match=r"dense_steps=2: .*count_steps"):
        ffn(x)
    optimizer = torch.optim.SGD(ffn.parameters(), lr=1e-3)
    count_steps(ffn, optimizer)
    seen = []
    for _ in range(4):
        for _ in range(2):  # micro-batches
            ffn(x).sum().backward()
        seen.append(ffn.sparse)
        optimizer.step()
    assert seen == [False, False, True, True]
    again = LowRankFFN(8, 16, 4, dense_steps=2).eval()
    again.load_state_dict(ffn.state_dict())
    assert again.sparse
    assert torch.equal(again(x), ffn.eval()(x))


PROBE = """
import json, os, sys, warnings, torch
def look():
    return [dict(os.environ), [str(f) for f in warnings.filters], sys.meta_path[:],
            len(torch.overrides._get_current_function_mode_stack()), str(torch.get_default_dtype()),
            torch.random.get_rng_state().sum().item(), id(torch.cuda.current_device), torch.is_grad_enabled(),
            torch.distributed.is_initialized()]
before = look()
import elas.nn
same = look() == before
ffn = elas.nn.LowRankFFN(8, 16, 4)
ffn(torch.ones(2, 8)).sum().backward()
heavy = [m for m in sys.modules if m.split(".")[0] in ("megatron", "deepspeed", "transformers", "triton")]
print(json.dumps([same, heavy, torch.distributed.is_initialized()]))
"""


def test_import_needs_no_megatron_and_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=dict(os.environ), capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [True, [], False]
