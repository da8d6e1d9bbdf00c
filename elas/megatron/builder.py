"""The builder for Megatron-LM's `model_provider`: a `GPTModel` of our layers from Megatron's arguments."""

import argparse
import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from elas import accelerator
from elas.errors import ConfigError, UserError
from elas.megatron.arguments import check_arguments, sections
from elas.megatron.watching import log_sparsity
from elas.model.activation import set_step
from elas.model.features import ARGUMENTS_REFUSED
from elas.model.init import initialise
from elas.model.spec import block_spec
from elas.model.transformer_config import ElasTransformerConfig


def elas_builder(
    args: argparse.Namespace,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection=None,
) -> GPTModel:
    """Build one chunk of the model, as a replacement of Megatron-LM's `gpt_builder`.

    Args:
        args: Megatron's arguments, with those of `extra_args_provider`; Megatron's keep their meaning.
        pre_process: whether the chunk has the embedding.
        post_process: whether it has the output layer.
        vp_stage: number of the chunk, in an interleaved pipeline.
        config: Megatron's configuration; None creates it from the arguments.
        pg_collection: process groups; None takes Megatron's global ones.

    Returns:
        The chunk. Its layers initialise themselves, or with `--layout-independent-init` as in `elas train`. With
        `--dense-steps` it follows Megatron's iterations.

    Raises:
        UserError: an argument that requests an unsupported feature.
    """
    _check_megatron_arguments(args)
    if not isinstance(config, ElasTransformerConfig):  # otherwise it has the settings of our arguments
        check_arguments(args)
    _seed_without_cuda(args)
    config = _configuration(args, config)
    try:
        spec: Any = block_spec(config, vp_stage, pg_collection)  # Megatron's annotation is too narrow
        model = GPTModel(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            **_model_arguments(args),
        )
    except UserError as error:
        raise _as_first_raised(error) from None
    if args.layout_independent_init:
        initialise(model, seed=args.seed, std=args.init_method_std)
    if config.sparsity.dense_steps:
        follow_iterations(model, args)
    if args.sparsity_tokens:
        log_sparsity(args)
    return model


def _check_megatron_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments of Megatron-LM outside its `TransformerConfig` that the model would not follow.

    Raises:
        ConfigError: the first of them, under its flag.
    """
    for name, why in ARGUMENTS_REFUSED.items():
        if getattr(args, name, None):
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(args, name), why, "leave it out")
    if args.position_embedding_type not in ("rope", "learned_absolute", "none"):
        fix = "use rope, learned_absolute or none"
        raise ConfigError("--position-embedding-type", args.position_embedding_type, "is not supported", fix)


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of Megatron-core's `GPTModel` from those of the command line, as Megatron-LM's `gpt_builder`."""
    return {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "fp16_lm_cross_entropy": args.fp16_lm_cross_entropy,
        "parallel_output": True,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "rope_scaling": args.use_rope_scaling,
        "rope_scaling_factor": args.rope_scaling_factor,
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
    }


def _as_first_raised(error: UserError) -> UserError:
    """The error of the layer: Megatron's spec builder raises it again, with more text, for each module around it."""
    while isinstance(error.__context__, UserError):
        error = error.__context__
    return error


def follow_iterations(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Count `sparsity.dense_steps` by the iterations of Megatron-LM's loop, also after a resume.

    Args:
        model: a chunk.
        args: Megatron's; its loop sets `curr_iteration`, the number of completed iterations.
    """

    def before_forward(module: torch.nn.Module, _inputs) -> None:
        if module.training:
            set_step([module], args.curr_iteration + 1)

    model.register_forward_pre_hook(before_forward)


def _configuration(args: argparse.Namespace, config: TransformerConfig | None) -> ElasTransformerConfig:
    if isinstance(config, ElasTransformerConfig):
        return config
    low_rank, sparsity = sections(args)
    if config is not None:
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(TransformerConfig)}
        own = {"low_rank": low_rank, "sparsity": sparsity, "recompute_bottleneck": args.recompute_bottleneck}
        return ElasTransformerConfig(**given, **own, init_std=args.init_method_std)
    from megatron.training.arguments import core_transformer_config_from_args  # pyright: ignore[reportMissingImports]

    own = {"low_rank": low_rank, "sparsity": sparsity, "init_std": args.init_method_std}
    return core_transformer_config_from_args(argparse.Namespace(**{**vars(args), **own}), ElasTransformerConfig)


def _seed_without_cuda(args: argparse.Namespace) -> None:
    """Seed Megatron's random streams on a CPU, where Megatron-LM does not."""
    tracker: Any = get_cuda_rng_tracker()
    if accelerator.has_cuda() or tracker.is_initialized():
        return
    if not mpu.model_parallel_is_initialized():
        raise UserError("no process groups: on a CPU call elas.parallel.initialize before Megatron's pretrain")
    tp, pp = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    accelerator.seed_model_parallel(args.seed, tp, pp)
