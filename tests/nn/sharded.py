"""On two ranks: layers of `elas.nn` as DTensors, and under FSDP2, beside the same on one."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, ffn_core
from elas.nn import LowRankFFN, SparseFFN, observe
from elas.nn.parallel import TensorParallelFFN

OPTIONS = {
    "fused": Relu24Options(),
    "compressed": Relu24Options(ffn_memory="compressed"),
    "compressed, soft threshold": Relu24Options(ffn_memory="compressed", method="soft_threshold"),
    "ste": Relu24Options(ffn_memory="compressed", gradient="ste"),
    "eager": Relu24Options(ffn_memory="eager"),
    "dense": Relu24Options(sparse=False),
}
DOUBLE = dict(dtype=torch.float64)
KINDS = {
    **{name: (lambda options=one: LowRankFFN(16, 32, 4, options=options, **DOUBLE)) for name, one in OPTIONS.items()},
    "biases": lambda: LowRankFFN(16, 32, 4, bias=True, **DOUBLE),
    "cola": lambda: LowRankFFN(16, 32, 4, between="silu", init="cola", **DOUBLE),
    "swiglu": lambda: LowRankFFN(16, 32, 4, activation="swiglu", bias=True, **DOUBLE),
    "full rank": lambda: SparseFFN(16, 32, bias=True, **DOUBLE),
}


def _grads(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *grads]


def tensor_parallel(compiled: bool) -> dict[str, float]:
    """By kind, the largest difference of output and gradients from the plain layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for kind in ("fused", "compressed") if compiled else KINDS:
        torch.manual_seed(3)
        plain = KINDS[kind]()
        x, dy = torch.randn(3, 5, 16, **DOUBLE), torch.randn(3, 5, 16, **DOUBLE)
        split = parallelize_module(copy.deepcopy(plain), mesh, TensorParallelFFN())
        want = _grads(plain, x, dy)
        if compiled:
            torch._dynamo.reset()
            split.compile(backend="aot_eager", fullgraph=True)
        found[kind] = max(float((a - b).abs().max()) for a, b in zip(_grads(split, x, dy), want, strict=True))
        if plain.is_relu2:
            seen = []
            for ffn in (plain, split):
                with observe(ffn) as counted:
                    ffn(x)
                seen.append(counted)
            found[f"{kind}, observed"] = 0.0 if seen[0] == seen[1] else 1.0
        if not compiled:
            assert split.linear_fc2.weight.to_local().shape[1] == 16 if kind == "full rank" else True
    return found


def by_hand() -> tuple[dict[str, float], str]:
    """Tokens or features as shards, by `distribute_tensor`; and the message where groups of four would be cut."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, rows, columns = Replicate(), Shard(0), Shard(1)
    found = {}
    for name, options in OPTIONS.items():
        for kind, placements in {"tokens": (rows, whole, whole), "features": (whole, rows, columns)}.items():
            torch.manual_seed(1)
            plain = [torch.randn(shape, **DOUBLE).requires_grad_() for shape in ((6, 4), (16, 4), (5, 16))]
            cut = [distribute_tensor(x.detach(), mesh, [p]).requires_grad_() for x, p in zip(plain, placements)]
            want = torch.autograd.grad(ffn_core(*plain, options).square().sum(), plain)
            with torch.no_grad():  # before: what is kept must not be remembered from this call
                values = ffn_core(*cut, options).full_tensor() - ffn_core(*plain, options)
            got = torch.autograd.grad(ffn_core(*cut, options).square().sum(), cut)
            differences = [values, *(a.full_tensor() - b for a, b in zip(got, want))]
            found[f"{name}, {kind}"] = max(float(one.abs().max()) for one in differences)
    cut = [torch.randn(shape, **DOUBLE) for shape in ((6, 4), (20, 4), (5, 20))]
    cut = [distribute_tensor(x, mesh, [p]) for x, p in zip(cut, (whole, rows, columns))]
    try:
        ffn_core(*cut, Relu24Options())
    except (ConfigError, RuntimeError) as error:
        return found, str(error)
    return found, "taken"


def cut_groups() -> list[str]:
    """What is said when a layer is split whose groups, or pairs of them in compressed memory, do not divide."""
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for size, memory in ((20, "fused"), (24, "compressed"), (24, "fused")):
        ffn = LowRankFFN(16, size, 4, options=Relu24Options(ffn_memory=memory))
        try:
            parallelize_module(ffn, mesh, TensorParallelFFN())
            said.append("taken")
        except ConfigError as error:
            said.append(str(error))
    return said


def fully_sharded() -> dict[str, float]:
    """FSDP2 at each linear, against plain: averaged gradients of the same batch on every rank are its own."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for kind, make in KINDS.items():
        torch.manual_seed(3)
        plain = make()
        x, dy = torch.randn(3, 5, 16, **DOUBLE), torch.randn(3, 5, 16, **DOUBLE)
        split = copy.deepcopy(plain)
        for linear in (split.linear_fc1, split.linear_fc2):
            fully_shard(linear)
        fully_shard(split)
        found[kind] = max(float((a - b).abs().max()) for a, b in zip(_grads(split, x, dy), _grads(plain, x, dy)))
    return found


def loro_on_shards() -> list[str]:
    """What LORO says of factors that are sharded after it was made, by FSDP2 and by hand, and before."""
    from torch.distributed.fsdp import fully_shard

    from elas.nn import LORO

    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []

    def refusal(call) -> str:
        try:
            call()
        except ConfigError as error:
            return str(error)
        return "taken"

    for shard in (fully_shard, lambda ffn: parallelize_module(ffn, mesh, TensorParallelFFN())):
        ffn = LowRankFFN(16, 32, 4)
        optimizer = LORO(ffn)
        shard(ffn)
        ffn(torch.randn(3, 16)).sum().backward()
        said += [refusal(optimizer.step), refusal(lambda ffn=ffn: LORO(ffn))]
    return said
