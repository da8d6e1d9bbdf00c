"""`model_provider` in Megatron's own signature, and the building of this rank's chunks with it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel

from elas.config import Config
from elas.model.init import initialise
from elas.model.spec import block_spec
from elas.model.transformer_config import transformer_config


def make_model_provider(config: Config) -> Callable[..., GPTModel]:
    """A `model_provider(pre_process, post_process, vp_stage)`, as Megatron-LM's `pretrain` takes it.

    Args:
        config: a validated configuration; Megatron's process groups must exist when the provider is called.

    Returns:
        A function that builds one chunk of the model, initialised independently of the layout.
    """

    def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
        megatron_config = transformer_config(config)
        model = GPTModel(
            megatron_config,
            block_spec(megatron_config, vp_stage),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_position_embeddings or config.model.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            vp_stage=vp_stage,
        )
        initialise(model, seed=config.train.seed, std=config.model.init_std)
        return model

    return model_provider


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


def count_parameters(chunks: list[torch.nn.Module]) -> int:
    """Parameters of the whole model, each counted once whatever the layout; every rank calls it.

    A rank counts its tensor-parallel shards. What all tensor-parallel ranks hold alike is counted by the first of them,
    a tied embedding by the first pipeline stage, a weight that ZeRO 3 has partitioned by its full shape.
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
    """The last pipeline stage's copy of a tied embedding, where this chunk holds it."""
    if chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process:
        return chunk.shared_embedding_or_output_weight()
    return None
