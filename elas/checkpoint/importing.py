"""`elas checkpoint import`: writes a `torch_dist` checkpoint of Megatron-LM as one of ours, to resume from.

Reading executes no code: tensors and the index are read like those of our own checkpoints, the common state with
torch's `weights_only` and the types that Megatron-core lists as safe.
"""

import argparse
import pickle
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from elas.checkpoint import storage
from elas.checkpoint.arguments import check_same_model
from elas.checkpoint.crossing import MASTERS, OPTIMIZER, OnDemand, Spot, spots
from elas.checkpoint.folder import file_facts, put_in_place
from elas.checkpoint.identity import effective, identity, versions
from elas.checkpoint.storage import MOMENTS
from elas.checkpoint.tensors import PartOfTensor
from elas.config import Config
from elas.errors import ConfigError, UserError
from elas.files import system_error
from elas.plan.shapes import weight_shapes
from elas.run_dir import checkpoints_dir

_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of Megatron-LM.

    Attributes:
        path: folder of one iteration.
        iteration: number of iterations done when it was written.
        arguments: Megatron-LM's saved arguments.
        sizes: shape of each tensor, by name.
        step: steps that the optimizer took; None if there are no readable moments.
        why_no_moments: the reason, if there are none.
    """

    path: Path
    iteration: int
    arguments: argparse.Namespace
    sizes: dict[str, tuple[int, ...]]
    step: int | None
    why_no_moments: str = ""


def read_foreign(path: Path) -> Foreign:
    """Read a checkpoint's index and common state; needs no process group.

    Args:
        path: Megatron-LM's `--save` folder, or an iteration's folder in it.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it has another format.
    """
    folder = path
    if (path / _TRACKER).is_file():
        last = (path / _TRACKER).read_text().strip()
        folder = path / (f"iter_{int(last):07d}" if last.isdecimal() else last)
    if not (folder / "common.pt").is_file():
        fix = "give Megatron-LM's --save folder, or an iter_… in it, written with --ckpt-format torch_dist"
        raise UserError(f"{path}: holds no torch_dist checkpoint of Megatron-LM; {fix}")
    try:
        index = storage.read_index(folder)
        common = _read_common(folder / "common.pt")
        iteration, arguments = int(common["iteration"]), common["args"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be read as a checkpoint of Megatron-LM ({why})") from error
    entries = index.state_dict_metadata.items()
    sizes = {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    step, why = _moments(common, sizes)
    return Foreign(folder, iteration, arguments, sizes, step, why)


def _read_common(path: Path) -> dict:
    from megatron.core.safe_globals import register_safe_globals

    # Not torch's context manager: at its end, Megatron-core would be unable to read its own files.
    register_safe_globals()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # torch's message advises executing the file
        raise pickle.UnpicklingError(f"{path.name} is damaged, or contains more than arguments and numbers") from error


def _moments(common: dict, sizes: dict) -> tuple[int | None, str]:
    """The optimizer's step; or None, and why there are no readable moments."""
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if not any(name.startswith(f"{OPTIMIZER}exp_avg.") for name in sizes):
        if kind and kind != "fully_reshardable":
            return None, f"those of the distributed optimizer are {kind}; save with --dist-ckpt-optim-fully-reshardable"
        return None, "it was saved without an optimizer, or with one other than Adam"
    outer = common.get("optimizer") or {}
    for state in (outer, outer.get("optimizer") or {}):
        step = (state.get("state") or {}).get("common_step")
        found = [step] if step is not None else [g["step"] for g in state.get("param_groups") or () if "step" in g]
        if found:
            return int(found[0]), ""
    return None, "the number of optimizer steps is missing"


def check_fits(foreign: Foreign, config: Config, weights_only: bool) -> dict[str, Spot]:
    """Check that the checkpoint holds the configuration's model.

    Args:
        foreign: from `read_foreign`.
        config: configuration of the run that will resume from it.
        weights_only: arguments that affect training only may differ.

    Returns:
        The position of each of our weights in it.

    Raises:
        ConfigError: a setting differs.
        UserError: a tensor is missing in the checkpoint, or unknown to the model.
    """
    check_same_model(config, foreign.arguments, foreign.path, weights_only)
    shapes = weight_shapes(config)
    found = spots(shapes, stacked="decoder.layers.0.input_layernorm.weight" not in foreign.sizes)
    for name, spot in found.items():
        there = foreign.sizes.get(spot.key)
        if there is None:
            fix = "give the settings of the model that Megatron-LM trained, by elas.megatron.elas_builder"
            raise UserError(f"{foreign.path}: lacks {spot.key}, a weight of this configuration; {fix}")
        if there != spot.whole:
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                why, fix = f"Megatron-LM padded the vocabulary to {there[0]}", f"set it to {there[0]}"
                raise ConfigError("model.vocab_size", config.model.vocab_size, why, fix)
            what = f"has shape {there}, but {spot.whole} by this configuration"
            raise UserError(f"{foreign.path}: {spot.key} {what}; give the settings of the model that was trained")
    keys = {spot.key for spot in found.values()}
    more = [key for key in foreign.sizes if key not in keys and not key.startswith(OPTIMIZER) and _is_weight(key)]
    if more:
        fix = "give the settings of the model that was trained"
        raise UserError(f"{foreign.path}: contains {more[0]}, which this configuration's model lacks; {fix}")
    return found


def _is_weight(key: str) -> bool:
    return key.rpartition(".")[2] != "sparsity_step" and not key.startswith(("rng_state", "rerun_state_machine"))


def import_(foreign: Foreign, config: Config, weights_only: bool) -> Path:
    """Check that the checkpoint fits, and write it into the run's folder, which must not have a checkpoint yet.

    Args:
        foreign: from `read_foreign`.
        config: configuration of the run that will resume from it.
        weights_only: omit the moments; the result can only be used as `checkpoint.init_from`.

    Returns:
        Folder of the new checkpoint.

    Raises:
        ConfigError, UserError: as `check_fits`; also for missing moments, or a folder that cannot be written.
    """
    found = check_fits(foreign, config, weights_only)
    if config.optimizer.kind != "adamw" and not weights_only:
        why, fix = "Megatron-LM's moments are AdamW's", "set it to adamw, or add --weights-only"
        raise ConfigError("optimizer.kind", config.optimizer.kind, why, fix)
    if not weights_only and foreign.step is None:
        fix = "add --weights-only, and start a run with checkpoint.init_from"
        raise UserError(f"{foreign.path}: has no moments to resume with ({foreign.why_no_moments}); {fix}")
    target = checkpoints_dir(config) / f"step_{foreign.iteration:08d}"
    partial_ = target.with_name(target.name + ".partial")
    manifest = _manifest(foreign, config, weights_only)
    try:
        if partial_.exists():
            shutil.rmtree(partial_)
        partial_.mkdir(parents=True)
        storage.write_alone(partial_, _tensors(foreign, found, weights_only))
        files = {path.name: file_facts(path) for path in sorted(partial_.iterdir())}
        put_in_place(partial_, target, manifest | {"files": files})
    except Exception as error:
        shutil.rmtree(partial_, ignore_errors=True)
        if (system := system_error(error)) is None:
            raise
        why = f"cannot be written ({system.strerror})"
        raise ConfigError("train.run_dir", config.train.run_dir, why, "give another folder") from error
    return target


def _tensors(foreign: Foreign, found: dict[str, Spot], weights_only: bool) -> storage.Tensors:
    tensors = {}
    for name, spot in found.items():
        masters = [prefix + spot.key for prefix in MASTERS if prefix + spot.key in foreign.sizes]
        sources = {"weight": (masters or [spot.key])[0]}
        if not weights_only:
            sources |= {moment: f"{OPTIMIZER}{moment}.{spot.key}" for moment in MOMENTS}
        for kind, key in sources.items():
            read = partial(_read, foreign.path, key, spot)
            tensors[f"{kind}.{name}"] = OnDemand(
                spot.shape, torch.float32, {(0,) * len(spot.shape): (spot.shape, read)}
            )
    return tensors


def _read(folder: Path, key: str, spot: Spot) -> torch.Tensor:
    tensor = torch.empty(spot.shape, dtype=torch.float32)
    storage.read(folder, {key: PartOfTensor(spot.whole, torch.float32, {spot.offsets: spot.view(tensor)})})
    return tensor


def _manifest(foreign: Foreign, config: Config, weights_only: bool) -> dict:
    there = vars(foreign.arguments).get
    consumed = there("consumed_train_samples") or foreign.iteration * config.train.global_batch_size
    layout = {
        "world_size": there("world_size") or 1,
        "tensor": there("tensor_model_parallel_size") or 1,
        "pipeline": there("pipeline_model_parallel_size") or 1,
        "virtual_pipeline": there("virtual_pipeline_model_parallel_size") or 1,
        "sequence": bool(there("sequence_parallel")),
        "data": there("data_parallel_size") or 1,
        "zero": 1 if there("use_distributed_optimizer") else 0,
        "written_by": "Megatron-LM",  # equals no layout of ours, so that no random streams are expected
    }
    kept = effective(config) | {"data.held_out": None} if weights_only else identity(config)
    return {
        "step": foreign.iteration,
        "tokens": consumed * config.model.seq_length,
        "consumed_samples": consumed,
        "optimizer_step": foreign.step or 0,
        "identity": kept,
        "layout": layout,
        "versions": versions(),
        "config": config.to_dict(),
        "shares": dict(config.shares),
        "imported_from": str(foreign.path.resolve()),
        "weights_only": weights_only,
    }
