"""`elas checkpoint export`: writes one of our checkpoints for Megatron-LM's `--load`.

`common.pt`, which holds Megatron-LM's state besides tensors, follows `generate_state_dict` of Megatron-LM core_v0.16.1,
in a form that each of its optimizers can read: fp32, bf16, and the fully reshardable distributed one.
"""

import argparse
import importlib.util
import json
from functools import partial
from pathlib import Path

import torch

from elas.checkpoint import storage
from elas.checkpoint.arguments import flags, saved
from elas.checkpoint.crossing import MASTERS, OPTIMIZER, OnDemand, Spot, spots
from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import written_config
from elas.checkpoint.storage import MOMENTS
from elas.config import Config
from elas.errors import Failure
from elas.files import new_folder, system_error
from elas.plan.shapes import weight_shapes

_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def export(checkpoint: Checkpoint, target: Path, adam: str) -> dict:
    """Write a checkpoint of Megatron-LM.

    Args:
        checkpoint: one of ours, intact.
        target: the folder to create, for `--load`.
        adam: `fused` if Megatron-LM runs with Apex or Transformer Engine, else `torch`: they store the step in
            different places, and neither can read the other's state.

    Returns:
        Facts for the console: `iteration`, `moments`, `folder`, the `flags` with which Megatron-LM computes the same,
        and the size of its padded `vocabulary`.

    Raises:
        UserError: the target exists, or cannot be written.
        Failure: the checkpoint's tensors do not match its configuration.
    """
    config = written_config(checkpoint)
    moments = config.optimizer.kind == "adamw" and not checkpoint.manifest.get("weights_only")
    with new_folder(target) as partial_:
        folder = partial_ / f"iter_{checkpoint.step:07d}"
        folder.mkdir()
        try:
            storage.write_alone(folder, _tensors(checkpoint, config, moments))
        except (RuntimeError, KeyError) as error:
            if system_error(error) is not None:
                raise
            raise Failure(f"{checkpoint.path}: its tensors do not match its settings ({error})") from error
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"} | _FORMAT))
        torch.save(_common(checkpoint, config, moments, adam), folder / "common.pt")
        (partial_ / "latest_checkpointed_iteration.txt").write_text(str(checkpoint.step))
    facts = {"iteration": checkpoint.step, "moments": moments, "folder": str(target)}
    return facts | {"flags": flags(config), "vocabulary": config.model.vocab_size}


def adam_here() -> str:
    """The kind of Adam that Megatron-LM would use on this machine."""
    found = any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))
    return "fused" if found else "torch"


_FORMAT = {"sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


def _tensors(checkpoint: Checkpoint, config: Config, moments: bool) -> dict[str, OnDemand | list]:
    """All tensors of Megatron's checkpoint; each is read from ours when it is written."""
    dtype = getattr(torch, config.train.dtype)
    kinds = [("weight", "", dtype)]
    if moments:
        kinds += [("weight", prefix, torch.float32) for prefix in MASTERS]
        kinds += [(moment, f"{OPTIMIZER}{moment}.", torch.float32) for moment in MOMENTS]
    makers: dict[str, tuple[Spot, torch.dtype, dict]] = {}
    for name, spot in spots(weight_shapes(config)).items():
        for kind, prefix, cast in kinds:
            read = partial(_read, checkpoint.path, f"{kind}.{name}", spot, cast)
            makers.setdefault(prefix + spot.key, (spot, cast, {}))[2][spot.offsets] = (_size(spot), read)
    for key, steps in _dense_steps(checkpoint, config).items():
        makers[key] = (Spot(key, tuple(steps.shape)), steps.dtype, {(0, 0): (tuple(steps.shape), lambda s=steps: s)})
    made = {key: OnDemand(spot.whole, cast, parts) for key, (spot, cast, parts) in makers.items()}
    return made | _extra_states(config)


def _extra_states(config: Config) -> dict[str, list]:
    """The empty states that Megatron-core's own linears, used at full rank, save for Transformer Engine."""
    if config.low_rank.kind != "none":
        return {}
    layers = config.model.num_layers
    keys = (f"decoder.layers.{linear}._extra_state/shard_{n}_{layers}" for linear in _LINEARS for n in range(layers))
    return {key: [None] for key in keys}


def _size(spot: Spot) -> tuple[int, ...]:
    return spot.shape if spot.layer is None else (1, *spot.shape)


def _read(folder: Path, name: str, spot: Spot, dtype: torch.dtype) -> torch.Tensor:
    return spot.view(storage.read_whole(folder, name, spot.shape, dtype))


def _dense_steps(checkpoint: Checkpoint, config: Config) -> dict[str, torch.Tensor]:
    """The step that each layer with dense steps saves, `[L, 1]`, for evaluation to prune as the last training step."""
    if config.sparsity.kind != "2:4" or not config.sparsity.dense_steps:
        return {}
    names = ["mlp"] if config.model.activation == "relu2" else []
    if config.low_rank.kind == "cola" and config.low_rank.activation == "relu2":
        names += [f"{linear}.activation" for linear in _LINEARS]
    steps = torch.full((config.model.num_layers, 1), checkpoint.step, dtype=torch.int64)
    return {f"decoder.layers.{name}.sparsity_step": steps for name in names}


def _common(checkpoint: Checkpoint, config: Config, moments: bool, adam: str) -> dict:
    """Megatron-LM's common state, the content of `common.pt`."""
    arguments = _arguments(checkpoint, config)
    arguments.no_save_optim = not moments
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    metadata |= {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": checkpoint.step, "content_metadata": metadata}
    common["num_floating_point_operations_so_far"] = 0
    if moments:
        inner = _optimizer(checkpoint, config, adam)
        common["optimizer"] = {**inner, "optimizer": inner, "param_state_sharding_type": "fully_reshardable"}
        common["opt_param_scheduler"] = _schedule(checkpoint, config)
    return common


def _optimizer(checkpoint: Checkpoint, config: Config, adam: str) -> dict:
    optimizer, step = config.optimizer, checkpoint.manifest["optimizer_step"]
    options = {
        "lr": optimizer.lr,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "bias_correction": True,
        "step": step,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "max_lr": optimizer.lr,
        "min_lr": 0.0,
        "default_config": True,
    }
    groups = [{**options, "wd_mult": 1.0}, {**options, "wd_mult": 0.0, "weight_decay": 0.0}]
    state = {"common_step": torch.tensor(float(step))} if adam == "torch" else {}
    return {"state": state, "param_groups": groups}


def _schedule(checkpoint: Checkpoint, config: Config) -> dict:
    """Only the consumed samples matter: Megatron-LM's schedules differ from ours, so users override the rest there."""
    samples, optimizer = checkpoint.manifest["consumed_samples"], config.optimizer
    return {
        "max_lr": optimizer.lr,
        "min_lr": 0.0,
        "lr_warmup_steps": 0,
        "lr_decay_steps": config.train.steps * config.train.global_batch_size,
        "lr_decay_style": "constant",
        "num_steps": samples,
        "start_wd": optimizer.weight_decay,
        "end_wd": optimizer.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": config.train.steps * config.train.global_batch_size,
    }


def _arguments(checkpoint: Checkpoint, config: Config) -> argparse.Namespace:
    """Megatron-LM's arguments that describe the model and the progress of training."""
    return argparse.Namespace(
        **saved(config),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=0,  # matches no layout, so that Megatron-LM restores neither random streams nor the rerun machine
        data_parallel_size=0,
        no_save_rng=True,
        consumed_train_samples=checkpoint.manifest["consumed_samples"],
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
