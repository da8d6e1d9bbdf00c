"""Reads a checkpoint's weights, whatever layout wrote it: whole tensors, or a model's parts of them.

Needs no engine, optimizer or DeepSpeed; `read_weights` needs no Megatron-core or process group either.

    found = find(Path("runs/60m"))                           elas.checkpoint.choose: by manifest and file sizes
    for name, tensor in read_weights(found): …               whole, one by one

    config = written_config(found)                           elas.checkpoint.identity
    chunks = build_chunks(config)                            elas.model.provider, on any layout
    load_weights(chunks, layout, found)

Only `load_weights` compares the files with their checksums; before `read_weights`, call
`elas.checkpoint.folder.require_intact`.
"""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from elas.checkpoint import storage
from elas.checkpoint.collective import FIX, damage, load_on_all_ranks
from elas.checkpoint.folder import Checkpoint, unusable
from elas.checkpoint.identity import written_config
from elas.checkpoint.tensors import PartOfTensor, Place
from elas.model.shards import global_names
from elas.plan.shapes import weight_shapes

if TYPE_CHECKING:  # imports Megatron-core
    from elas.parallel import Layout


def read_weights(
    checkpoint: Checkpoint, names: Iterable[str] | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read weights one by one; the memory needed is that of the largest.

    Args:
        checkpoint: intact; of any layout.
        names: names of weights in the order to read them, of `elas.plan.shapes.weight_shapes`; None for all of the
            model. A tied embedding is one weight, `embedding.word_embeddings.weight`.
        dtype: of the tensors returned; the checkpoint holds fp32.

    Yields:
        Name and whole tensor `[out, in]` (norms: `[h]`) in host memory.

    Raises:
        KeyError: `names` has a name that is not a weight of the model.
        UserError: the checkpoint cannot be read, or its tensors do not match its own configuration.
    """
    shapes = weight_shapes(written_config(checkpoint))
    asked = list(shapes if names is None else names)
    if unknown := [name for name in asked if name not in shapes]:
        raise KeyError(f"no weights of the model: {', '.join(unknown)}")
    try:
        index = storage.read_index(checkpoint.path)
        for name in asked:
            yield name, storage.read_whole(checkpoint.path, f"weight.{name}", shapes[name], dtype, index)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        why = f"its weights cannot be read ({type(error).__name__}: {error})"
        raise unusable(checkpoint.path, why, "see elas checkpoint verify, or give another checkpoint") from error


def load_weights(
    chunks: Sequence[torch.nn.Module], layout: "Layout", checkpoint: Checkpoint, key: str | None = None
) -> None:
    """Fill a model's parameters from a checkpoint, after checking every byte of it; every rank must call it.

    Only weights are loaded. A model whose 2:4 starts after `sparsity.dense_steps` must also get the step:
    `elas.model.activation.set_step(chunks, checkpoint.step)`.

    Args:
        chunks: this rank's parts of the model, from `elas.model.provider.build_chunks`; the values are converted to
            the parameters' dtype and copied to their device.
        layout: this rank's place; any, whatever layout wrote the checkpoint.
        checkpoint: the checkpoint, from `elas.checkpoint.choose.find`.
        key: the setting that names the checkpoint, for messages.

    Raises:
        UserError: a file is damaged, or the weights do not fit the model (as a `ConfigError` of `key`, if given);
            raised on every rank.
    """
    if problems := damage(checkpoint):
        raise unusable(checkpoint.path, ", ".join(problems), FIX, key)
    load_on_all_ranks(lambda: storage.read(checkpoint.path, model_weights(chunks, layout)), checkpoint, key)


def parameters_by_name(chunks: Iterable[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the whole model; for a tied embedding, this stage's own copy."""
    return {name: p for chunk in chunks for name, p in global_names(chunk).items()}


def model_weights(chunks: Iterable[torch.nn.Module], layout: "Layout") -> storage.Tensors:
    """The model's weights on this rank, in their own dtype, as views to load into; by `weight.NAME`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters_by_name(chunks).items():
        flat, start = held(parameter, layout)
        if flat.numel():
            tensors[f"weight.{name}"] = PartOfTensor.of(place_of(parameter, layout), flat, start)
    return tensors


def held(parameter: torch.nn.Parameter, layout: "Layout") -> tuple[torch.Tensor, int]:
    """What this rank holds of a parameter's tensor-parallel shard: all of it, or with ZeRO 3 a range.

    Returns:
        A flat view `[numel]`, and the index of its first element in the flattened shard.
    """
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.data.view(-1), 0
    partitioned: Any = parameter  # by DeepSpeed's ZeRO 3
    start = layout.dp_rank * partition.numel()
    numel = max(0, min(partition.numel(), partitioned.ds_numel - start))  # the last ranks hold padding
    return partition.view(-1)[:numel], start


def place_of(parameter: torch.nn.Parameter, layout: "Layout") -> Place:
    """The position of this rank's tensor-parallel shard of a parameter in the whole tensor."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if layout.tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return Place(shape, shape)
    sharded: Any = parameter  # by Megatron-core
    dim, full = sharded.partition_dim, list(shape)
    full[dim] *= layout.tp
    return Place(shape, tuple(full), dim, layout.tp_rank, sharded.partition_stride if dim == 0 else 1)
