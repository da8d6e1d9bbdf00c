"""On each rank: how often modules are called, and the model with its linears sharded by FSDP2 beside the plain one."""

import torch
from small import KINDS, batch, loss_of, small


def build(overrides: dict) -> torch.nn.Module:
    from elas.model.provider import make_model_provider

    return make_model_provider(small(overrides))()


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2].startswith("linear_")}


def count_calls(recompute: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Of one pass, by kind and linear: pre-forward, forward and full backward hooks that ran.

    Args:
        recompute: `none`, `bottleneck` (where there is one), or `full` by Megatron's own setting.
    """
    from elas import parallel
    from elas.config import ParallelConfig

    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    return {kind: _calls({**overrides, "parallel.tensor": 2}, recompute) for kind, overrides in KINDS.items()}


def _calls(overrides: dict, recompute: str) -> dict[str, tuple[int, int, int]]:
    ours = None if recompute == "bottleneck" else "none"
    model = build({**overrides, "model.num_layers": 1, "train.recompute": ours})
    if recompute == "full":
        config = model.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    linears = _linears(model)
    counts = {name: [0, 0, 0] for name in linears}

    def count(name: str, which: int):
        def hook(*_args):
            counts[name][which] += 1

        return hook

    for name, module in linears.items():
        module.register_forward_pre_hook(count(name, 0))
        module.register_forward_hook(count(name, 1))
        module.register_full_backward_hook(count(name, 2))
    loss_of(model, *batch()).backward()
    return {name: tuple(numbers) for name, numbers in counts.items()}


def fsdp_against_plain() -> dict[str, tuple[float, float]]:
    """By kind: largest differences of loss and gradients, relative to the largest gradient, over two steps of SGD."""
    from elas import parallel
    from elas.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    return {kind: _fsdp_difference(overrides) for kind, overrides in KINDS.items()}


def _fsdp_difference(overrides: dict) -> tuple[float, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = build({**overrides, "model.num_layers": 1}), build({**overrides, "model.num_layers": 1})
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in _linears(sharded).values():
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    losses, gradients = [], []
    for seed in range(2):
        rows = slice(torch.distributed.get_rank(), None, 2)
        tokens, labels = batch(4, seed)
        expected = loss_of(plain, tokens, labels)
        expected.backward()
        loss = loss_of(sharded, tokens[rows], labels[rows])
        loss.backward()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(abs(float(mean) / 2 - float(expected)))
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            gradients.append(float((a.grad.full_tensor() - b.grad).abs().max() / b.grad.abs().max()))
        with torch.no_grad():
            for parameter in (*plain.parameters(), *sharded.parameters()):
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return max(losses), max(gradients)
