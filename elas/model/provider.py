"""`model_provider` with Megatron-LM's signature, and building this rank's chunks with it."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from elas.config import Config
from elas.errors import ConfigError, UserError
from elas.model.features import WORKS
from elas.model.head import LeanGPTModel
from elas.model.init import initialise
from elas.model.spec import block_spec
from elas.model.transformer_config import ElasTransformerConfig, transformer_config

# Fields of Megatron's configuration that decide how layers run and not what they compute; they are adopted.
_ADOPTED = (
    "recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations "
    "calculate_per_token_loss cross_entropy_loss_fusion cross_entropy_fusion_impl deallocate_pipeline_outputs "
    "num_microbatches_with_partial_activation_checkpoints variable_seq_lengths microbatch_group_size_per_vp_stage "
    "gradient_accumulation_fusion overlap_p2p_comm batch_p2p_comm use_cpu_initialization"
)
ADOPTED = _ADOPTED.split()
# `elas.model.init` initialises parameters, and the pipeline's dtype is that of the parameters.
_NOT_COMPARED = {"perform_initialization", "pipeline_dtype", *(name for name in WORKS if "init_method" in name)}


def make_model_provider(config: Config) -> Callable[..., GPTModel]:
    """A `model_provider` for Megatron-LM's `pretrain`, of the model that our configuration describes.

    It checks that the process groups and Megatron's arguments, if there are any, agree with the configuration. Scripts
    that are configured by Megatron's arguments use `elas.megatron.elas_builder` instead.

    Args:
        config: a validated configuration; Megatron's process groups must exist when the provider is called.

    Returns:
        A function that builds one chunk of the model with layout-independent initial weights.
    """
    ours = config

    def model_provider(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection=None,
    ) -> GPTModel:
        """One chunk of the model.

        Args:
            pre_process: whether it holds the embedding.
            post_process: whether it holds the output layer.
            vp_stage: number of the chunk, in an interleaved pipeline.
            config: Megatron's configuration, if the caller has one.
            pg_collection: process groups; None takes Megatron's global ones.

        Raises:
            UserError: the process groups or Megatron's configuration describe another model.
        """
        mine = _in_agreement(ours, config)
        spec: Any = block_spec(mine, vp_stage, pg_collection)  # Megatron's annotation is narrower than what it takes
        model = LeanGPTModel(
            mine,
            spec,
            vocab_size=ours.model.vocab_size,
            max_sequence_length=ours.model.max_position_embeddings or ours.model.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=ours.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=ours.model.rotary_base,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        initialise(model, seed=ours.train.seed, std=ours.model.init_std)
        return model

    return model_provider


def _in_agreement(ours: Config, theirs: TransformerConfig | None) -> ElasTransformerConfig:
    """Our model's configuration, with the fields adopted from Megatron's, if there is one.

    Raises:
        UserError: the process groups, or Megatron's configuration or arguments, describe another model.
    """
    mine = transformer_config(ours)
    _check_groups(mine)
    args = arguments_of_megatron_training()
    if theirs is None and args is not None:
        from megatron.training.arguments import core_transformer_config_from_args  # pyright: ignore[reportMissingImports]

        theirs = core_transformer_config_from_args(args)
    if theirs is None:
        return mine
    _check_optimizer(ours)
    _check_agreement(mine, theirs, [] if args is None else _arguments_that_differ(ours, args))
    adopted = {name: getattr(theirs, name) for name in ADOPTED}
    if theirs.recompute_granularity is None:  # ours holds
        adopted = {name: value for name, value in adopted.items() if not name.startswith("recompute_")}
    elif ours.train.recompute is None:
        adopted["recompute_bottleneck"] = mine.recompute_bottleneck and theirs.recompute_granularity != "full"
    return dataclasses.replace(mine, **adopted)


def arguments_of_megatron_training():
    """The arguments of a running Megatron-LM script; None outside of one."""
    module = sys.modules.get("megatron.training.global_vars")  # not imported, since it is not in the wheel
    return None if module is None else module._GLOBAL_ARGS


def _arguments_that_differ(config: Config, args) -> list[str]:
    """Differences in Megatron-LM's arguments that define the model but are not in its `TransformerConfig`."""
    model = config.model
    pairs = {
        "model.vocab_size": (model.vocab_size, args.padded_vocab_size),
        "model.seq_length": (model.seq_length, args.seq_length),
        "model.tie_embeddings": (model.tie_embeddings, not args.untie_embeddings_and_output_weights),
        "model.rotary_base": (model.rotary_base, args.rotary_base),
        "position embedding": ("rope", args.position_embedding_type),
        "rotary_percent": (1.0, args.rotary_percent),
        "rope scaling": (False, args.use_rope_scaling),
    }
    return [f"{name}={mine} (Megatron: {other})" for name, (mine, other) in pairs.items() if mine != other]


def _check_groups(config: ElasTransformerConfig) -> None:
    sizes = {
        "parallel.tensor": (config.tensor_model_parallel_size, mpu.get_tensor_model_parallel_world_size()),
        "parallel.pipeline": (config.pipeline_model_parallel_size, mpu.get_pipeline_model_parallel_world_size()),
        "parallel.virtual_pipeline": (
            config.virtual_pipeline_model_parallel_size or 1,
            mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
        ),
        "context parallelism": (config.context_parallel_size, mpu.get_context_parallel_world_size()),
    }
    wrong = [f"{name}={ours} (groups: {theirs})" for name, (ours, theirs) in sizes.items() if ours != theirs]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: process groups have other sizes than the configuration; make them equal")


def _check_optimizer(ours: Config) -> None:
    if ours.optimizer.kind in ("loro", "muon"):
        why = "its steps need factors and moments where elas train's optimizer keeps them; Megatron's are elsewhere"
        raise ConfigError("optimizer.kind", ours.optimizer.kind, why, "train with elas train, or set it to adamw")


def _check_agreement(ours: ElasTransformerConfig, theirs: TransformerConfig, wrong: list[str]) -> None:
    names = [name for name in WORKS if name not in _NOT_COMPARED and name not in ADOPTED]
    for name in names:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other and (mine or other):  # None, False and 0 mean the same
            shown = [getattr(value, "__name__", value) for value in (mine, other)]
            wrong.append(f"{name}={shown[0]} (Megatron: {shown[1]})")
    if wrong:
        fix = "make them equal, or build with elas.megatron.elas_builder, which follows Megatron's arguments"
        raise UserError(f"this configuration and Megatron's describe two models: {', '.join(wrong)}; {fix}")


def build_chunks(config: Config) -> list[GPTModel]:
    """Build this rank's part of the model: one chunk, or `virtual_pipeline` of them.

    Returns:
        Chunks in the order of Megatron's interleaved schedule.
    """
    provider = make_model_provider(config)
    vpp = config.parallel.virtual_pipeline
    if vpp == 1:
        return [provider(mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage())]
    chunks = []
    for stage in range(vpp):
        first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunks.append(provider(first, last, stage))
        chunks[-1].model_type = getattr(chunks[-1], "model_type", None)
    return chunks


def count_parameters(chunks: Sequence[Any]) -> int:
    """Parameters of the whole model, each counted once in every layout; every rank must call it.

    A rank counts its tensor-parallel shards. The first tensor-parallel rank counts replicated parameters, the first
    pipeline stage a tied embedding; weights that ZeRO 3 has partitioned count with their full shape.
    """
    first = mpu.get_tensor_model_parallel_rank() == 0
    total = 0
    for chunk in chunks if mpu.get_data_parallel_rank() == 0 else ():
        copy = tied_copy(chunk)
        for parameter in chunk.parameters():
            if parameter is not copy and (first or getattr(parameter, "tensor_model_parallel", False)):
                total += getattr(parameter, "ds_numel", parameter.numel())
    counted = torch.tensor(total, device=torch.cuda.current_device())
    dist.all_reduce(counted)
    return int(counted)


def tied_copy(chunk: GPTModel) -> torch.nn.Parameter | None:
    """The last pipeline stage's copy of a tied embedding, if it is in this chunk."""
    if chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process:
        weight = chunk.shared_embedding_or_output_weight()
        assert isinstance(weight, torch.nn.Parameter)
        return weight
    return None
