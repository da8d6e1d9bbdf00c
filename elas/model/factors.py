"""Initialisation of factors from Megatron-core's random streams."""

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from elas.model.transformer_config import ElasTransformerConfig, leave_uninitialised


def draw_factor(factor: Any, config: ElasTransformerConfig, tp_group) -> None:
    """Initialise a factor as Megatron's linears are: split ones from the model-parallel random stream.

    Normal with the factor's `init_std`, or by `config.factor_init_method`. Megatron's `init_method` is not used: it is
    for whole matrices, and a product of two factors drawn by it has a deviation of `std²·sqrt(r)`, 50 times too small.
    Nothing is drawn if `config.perform_initialization` is False or `config.init_method` is `leave_uninitialised`: then
    `elas.model.init.initialise` or a checkpoint fills every parameter.

    Args:
        factor: a `torch.nn.Parameter` with the attribute `init_std` and, if it is split, those of Megatron.
        config: the layer's.
        tp_group: tensor-parallel group.
    """
    if not config.perform_initialization or config.init_method is leave_uninitialised:
        return
    draw = config.factor_init_method or (lambda tensor: torch.nn.init.normal_(tensor, 0.0, factor.init_std))
    split = getattr(factor, "tensor_model_parallel", False)
    if config.use_cpu_initialization:  # every rank draws the whole tensor from the same stream and keeps its part
        whole = list(factor.shape)
        if split:
            whole[factor.partition_dim] *= tp_group.size()
        drawn = torch.empty(whole)
        draw(drawn)
        with torch.no_grad():
            factor.copy_(drawn.chunk(tp_group.size(), factor.partition_dim)[tp_group.rank()] if split else drawn)
        return
    stream: Any = get_cuda_rng_tracker()
    with stream.fork() if split and (tp_group.size() > 1 or stream.is_initialized()) else contextlib.nullcontext():
        draw(factor)
