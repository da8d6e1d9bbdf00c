"""On two ranks: steps of Megatron-core's own data parallelism and optimizers over our layers."""

import dataclasses

import torch
from small import batch, loss_of, small

WIDE = {  # 0.4 million parameters, so that the buckets below are several
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 512,
    "model.vocab_size": 512,
    "low_rank.rank": 32,
}
RECOMPUTE = {
    "full, uniform": ("full", "uniform", 1, None),
    "full, block": ("full", "block", 2, None),
    "core_attn": ("selective", None, None, ["core_attn"]),
    "mlp": ("selective", None, None, ["mlp"]),
    "both": ("selective", None, None, ["core_attn", "mlp"]),
}


def train(overrides: dict, tensor: int = 1, steps: int = 4, **ddp) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a few steps of Adam, by Megatron's DDP with these options.

    Args:
        overrides: of the configuration.
        tensor: tensor-parallel ranks; the rest is data parallel.
        steps: of the optimizer.
        ddp: fields of Megatron's `DistributedDataParallelConfig`.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.provider import make_model_provider

    parallel.initialize(ParallelConfig(tensor=tensor), seed=1)
    provider = make_model_provider(small({**WIDE, **overrides, "parallel.tensor": tensor}))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = provider(pre_process=True, post_process=True, config=None, pg_collection=groups)  # as `get_model` does
    config = model.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), model)
    wrapped.broadcast_params()
    names = ("use_distributed_optimizer", "overlap_param_gather")
    options = {name: ddp[name] for name in names if name in ddp}
    settings = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, weight_decay=0.0, **options)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    losses, norms = [], []
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for step in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        tokens, labels = (x[rank::size] for x in batch(4, seed=step))
        loss = loss_of(wrapped, tokens, labels)
        loss.backward()
        finalize_model_grads([wrapped])
        _, norm, _ = optimizer.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean, group=mpu.get_data_parallel_group())
        losses.append(float(mean) / size)
        norms.append(float(norm))
    return losses, norms


def recompute() -> dict[str, float]:
    """By mode of recomputation: largest difference of any gradient from none, under attention dropout and TP."""
    from elas import parallel
    from elas.config import ParallelConfig

    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    plain = _gradients(None, None, None, None, ours="none")
    found = {name: _gradients(*mode) for name, mode in RECOMPUTE.items()}
    found["bottleneck"] = _gradients(None, None, None, None, ours="bottleneck")
    return {name: max(float((a - b).abs().max()) for a, b in zip(plain, other)) for name, other in found.items()}


def _gradients(granularity, method, layers, modules, ours: str | None = None) -> list[torch.Tensor]:
    from elas import accelerator
    from elas.model.provider import make_model_provider
    from elas.model.transformer_config import transformer_config

    config = small({"parallel.tensor": 2, "train.recompute": ours})
    theirs = dataclasses.replace(
        transformer_config(config),
        recompute_granularity=granularity,
        recompute_method=method,
        recompute_num_layers=layers,
        recompute_modules=modules,
    )
    model = make_model_provider(config)(config=theirs)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.1  # of the core attention
    accelerator.seed_model_parallel(7, torch.distributed.get_rank(), 0)
    loss_of(model, *batch()).backward()
    return [parameter.grad for parameter in model.parameters()]


def count_steps_of(accumulate: int) -> list[tuple[bool, bool]]:
    """Two dense steps asked for, each of `accumulate` passes: is 2:4 on, in training and in the evaluation after it."""
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.activation import SparseSwitch
    from elas.model.counting import count_steps
    from elas.model.provider import make_model_provider

    parallel.initialize(ParallelConfig(), seed=1)
    model = make_model_provider(small({"sparsity.dense_steps": 2}))()
    model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
    model.config.recompute_num_layers = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    count_steps(model, optimizer)
    switch = next(module for module in model.modules() if isinstance(module, SparseSwitch))
    seen = []
    for _ in range(4):
        for _ in range(accumulate):
            loss_of(model, *batch()).backward()
        training = switch.sparse
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss_of(model, *batch())
        seen.append((training, switch.sparse))
        model.train()
    return seen


def provider_refusals() -> list[str]:
    """What the provider says where Megatron's configuration, or its groups, are others."""
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.errors import UserError
    from elas.model.activation import set_step
    from elas.model.provider import make_model_provider
    from elas.model.transformer_config import transformer_config

    parallel.initialize(ParallelConfig(pipeline=2), seed=1)
    theirs = dataclasses.replace(
        transformer_config(small({"parallel.pipeline": 2})), num_layers=2, ffn_hidden_size=64, attention_dropout=0.1
    )
    bf16 = transformer_config(small({"parallel.pipeline": 2, "train.dtype": "bfloat16"}))
    messages = []
    loro = {"parallel.pipeline": 2, "optimizer.kind": "loro"}
    cases = (({}, None), ({"parallel.pipeline": 2}, theirs), ({"parallel.pipeline": 2}, bf16), (loro, theirs))
    for overrides, config in cases:
        try:
            make_model_provider(small(overrides))(True, False, config=config)
        except UserError as refusal:
            messages.append(str(refusal))
    model = make_model_provider(small({"parallel.pipeline": 2, "sparsity.dense_steps": 3}))(True, False)
    tokens = batch()[0]
    try:
        model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    except UserError as refusal:
        messages.append(str(refusal))
    set_step([model], 1)
    model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return messages
