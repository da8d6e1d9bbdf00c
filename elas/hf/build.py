"""The transformers model of a checkpoint, in one process and without Megatron-core or DeepSpeed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import written_config
from elas.checkpoint.weights import read_weights
from elas.config import Config, ffn_width
from elas.errors import UserError
from elas.hf.configuration_elas import ElasConfig
from elas.hf.model_type import model_type
from elas.hf.modeling_elas import ElasForCausalLM, ElasRotaryEmbedding
from elas.hf.weights import split


def sparse_at(config: Config, step: int) -> bool:
    """Whether the model is 2:4 sparse after `step` steps: it runs as the last of them did, or as the first will."""
    return config.sparsity.kind == "2:4" and max(1, step) > config.sparsity.dense_steps and _has_squared_relu(config)


def _has_squared_relu(config: Config) -> bool:
    cola = config.low_rank.kind == "cola" and config.low_rank.activation == "relu2"
    return config.model.activation == "relu2" or cola


def hf_config(config: Config, step: int, dtype: torch.dtype | None = None) -> ElasConfig:
    """Our configuration as transformers'.

    Args:
        config: the run's.
        step: training steps that the weights have seen.
        dtype: of the weights; None for `train.dtype`.
    """
    model, low_rank, sparsity = config.model, config.low_rank, config.sparsity
    return ElasConfig(
        architectures=["ElasForCausalLM"],
        dtype=dtype or getattr(torch, config.train.dtype),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=ffn_width(config),
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        hidden_act="silu" if model.activation == "swiglu" else "relu2",
        max_position_embeddings=model.max_position_embeddings or model.seq_length,
        initializer_range=model.init_std,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        low_rank=low_rank.kind,
        rank=low_rank.rank,
        factor_act=low_rank.activation,
        sparsity="2:4" if sparse_at(config, step) else "none",
        sparsity_method=sparsity.method,
        sparsity_gradient=sparsity.gradient,
        sparsity_scale=sparsity.scale,
    )


def hf_tensors(checkpoint: Checkpoint, config: Config, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's weights under transformers' names, one of ours in memory at a time."""
    for name, tensor in read_weights(checkpoint):
        for one, part in split(name, tensor, config).items():
            yield one, part.to(dtype, copy=True)  # safetensors takes no views of one tensor


def model_of(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = "cpu") -> ElasForCausalLM:
    """The model of a checkpoint, for evaluation.

    Args:
        checkpoint: of any layout.
        dtype: of its weights; None for `train.dtype`.
        device: where they go.

    Returns:
        The model, in evaluation mode.
    """
    config = written_config(checkpoint)
    chosen: torch.dtype = dtype or getattr(torch, config.train.dtype)
    made = hf_config(config, checkpoint.step, chosen)
    with torch.device("meta"):
        model = ElasForCausalLM(made)
    tensors = {name: tensor.to(device) for name, tensor in hf_tensors(checkpoint, config, chosen)}
    model.load_state_dict(tensors, strict=not made.tie_word_embeddings, assign=True)
    model.model.rotary_emb = ElasRotaryEmbedding(made).to(device)  # its buffers are in no checkpoint
    model.tie_weights()
    return model.eval()


def open_folder(folder: Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The model of a Hugging Face folder; runs no code from it.

    Args:
        folder: one that `elas export hf` wrote, in either form, or any other causal language model.
        dtype: of its weights; `auto` for as written.
        device: where they go.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the folder has no model in it, or it cannot be read.
    """
    kind = model_type(folder)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    loads = ElasForCausalLM if kind == "elas" else AutoModelForCausalLM
    try:
        model = loads.from_pretrained(folder, dtype=dtype)
        model.to(device)  # pyright: ignore[reportArgumentType]  its decorator's type lost `self`
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: its model cannot be read ({why}); export it again, or give another") from error
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder}: {name} has values that are not finite; export it again, or give another")
    return model.eval()
