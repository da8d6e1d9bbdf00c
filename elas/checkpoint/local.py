"""Checkpoints: one file a rank, and a manifest that makes them count.

    RUN_DIR/checkpoints/step_00000100/rank_00000.pt …  manifest.json

A save writes into `step_N.partial`, then the manifest with every file's size and SHA-256, then renames the folder. What
has no manifest does not count, so a run killed at any moment finds its last whole checkpoint. Resumes on the layout
that wrote it; another layout is refused from the manifest, before anything starts.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from elas.config import Config
from elas.data.corpus import corpus_identity
from elas.errors import ConfigError
from elas.train.deepspeed_config import read_deepspeed_json, zero_stage
from elas.train.metrics import read_jsonl

MUST_MATCH = ("model", "low_rank", "parallel", "train.dtype", "train.seed", "train.global_batch_size", "optimizer.kind",
              "data.split", "data.packing", "sparsity.kind")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and its manifest."""

    path: Path
    manifest: dict
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are not whole, and why."""

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.manifest["step"]


def checkpoints_dir(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.train.run_dir) / "checkpoints"


def identity(config: Config, world_size: int) -> dict:
    """What must be the same to resume: flat settings, the ZeRO stage, what the corpora hold, the number of ranks."""
    values = config.to_dict()
    flat = {}
    for key in MUST_MATCH:
        section, _, name = key.partition(".")
        entries = {name: values[section][name]} if name else values[section]
        flat |= {f"{section}.{k}": v for k, v in entries.items()}
    flat.pop("parallel.deepspeed_config")
    corpora = corpus_identity(config)
    return {**flat, **corpora, "parallel.zero": zero_stage(read_deepspeed_json(config)), "world_size": world_size}


def read_checkpoint(path: Path) -> Checkpoint | str:
    """Read a checkpoint's manifest and compare the sizes of its files; a text says why it does not count."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"no readable manifest.json ({error})"
    try:
        if type(manifest["step"]) is not int or type(manifest["tokens"]) is not int or not manifest["files"]:
            return "manifest.json is not a checkpoint's"
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        dict(manifest["identity"])
    except (TypeError, KeyError, AttributeError, ValueError):
        return "manifest.json is not a checkpoint's"
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
    return Checkpoint(path, manifest)


def find_checkpoint(config: Config, world_size: int) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` asks for, if it fits; needs no process group.

    Returns:
        None to start afresh.

    Raises:
        ConfigError: a named checkpoint is not whole, the layout or model differs, the run is past `train.steps`, or a
            fresh start would overwrite a run.
    """
    resume, folder = config.checkpoint.resume, checkpoints_dir(config)
    if resume == "none":
        metrics = Path(config.train.run_dir) / "metrics.jsonl"
        if metrics.exists():
            fix = "give another folder, move this one away, or set checkpoint.resume=auto to go on with it"
            raise ConfigError("train.run_dir", config.train.run_dir, "already holds a run", fix)
        return None
    if resume != "auto":
        found = read_checkpoint(Path(resume))
        if isinstance(found, str):
            raise ConfigError("checkpoint.resume", resume, found, "give the folder of a whole checkpoint")
        return _fitting(found, config, world_size)
    passed_over = []
    for path in sorted(folder.glob("step_*[0-9]"), reverse=True):
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return _fitting(replace(found, passed_over=tuple(passed_over)), config, world_size)
        passed_over.append(f"{path}: {found}")
    if passed_over:
        why = f"none of its checkpoints is whole ({'; '.join(passed_over)})"
        raise ConfigError("train.run_dir", config.train.run_dir, why, "mend one, move the folder away, or give another")
    _check_not_lost(config)
    return None


def _check_not_lost(config: Config) -> None:
    """Refuse to start over a run that had checkpoints; one killed before its first is simply begun again."""
    rows = read_jsonl(Path(config.train.run_dir) / "metrics.jsonl")
    every = config.checkpoint.every_steps
    last = rows[-1]["step"] if rows else 0
    if last and (last >= config.train.steps or (every and last > every)):
        why = f"its metrics go to step {last}, but its checkpoints are gone"
        fix = "put them back, name one as checkpoint.resume, move the folder away, or give another"
        raise ConfigError("train.run_dir", config.train.run_dir, why, fix)


def _fitting(found: Checkpoint, config: Config, world_size: int) -> Checkpoint:
    now, then = identity(config, world_size), found.manifest["identity"]
    for key, value in now.items():
        if key in then and then[key] != value:
            why = f"the checkpoint {found.path} was written with {key}={then[key]!r}"
            raise ConfigError(key, value, why, "resume with the same setting, or start in another train.run_dir")
    if found.step > config.train.steps:
        why = f"the run is at step {found.step} already ({found.path})"
        raise ConfigError("train.steps", config.train.steps, why, "give more steps, or start in another folder")
    return found


def save(config: Config, state: dict, identity: dict, *, step: int, consumed: int, tokens: int) -> Path:
    """Write a checkpoint; every rank calls it, and it counts for all or for none.

    Args:
        config: the run's configuration, kept in the manifest.
        state: this rank's state, from `elas.checkpoint.state.capture`.
        identity: what a resuming run must share, from `identity`.
        step: optimizer steps taken.
        consumed: samples consumed.
        tokens: tokens trained on.

    Returns:
        The checkpoint's folder.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    target = checkpoints_dir(config) / f"step_{step:08d}"
    partial = target.with_name(target.name + ".partial")
    if rank == 0:
        for stale in target.parent.glob("*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    dist.barrier()
    name = f"rank_{rank:05d}.pt"
    with (partial / name).open("wb+") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        facts = {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    everybody: list = [None] * world
    dist.all_gather_object(everybody, (name, facts))
    if rank == 0:
        manifest = {
            "format": 1,
            "step": step,
            "consumed_samples": consumed,
            "tokens": tokens,
            "identity": identity,
            "config": config.to_dict(),
            "files": dict(everybody),
        }
        with (partial / "manifest.json").open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _prune(config)
    dist.barrier()
    return target


def _prune(config: Config) -> None:
    """Remove all but the newest `checkpoint.keep`; the manifest goes first, so a half-removed one never counts."""
    if config.checkpoint.keep == 0:
        return
    for path in sorted(checkpoints_dir(config).glob("step_*[0-9]"))[: -config.checkpoint.keep]:
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path)


def load(checkpoint: Checkpoint) -> dict:
    """Read this rank's state and check it against the manifest; every rank calls it.

    Raises:
        ConfigError: a file's contents are not those that were written; the same error on every rank.
    """
    name = f"rank_{dist.get_rank():05d}.pt"
    state, problem = None, None
    try:
        with (checkpoint.path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == checkpoint.manifest["files"][name]["sha256"]:
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=False)
            else:
                problem = f"{name} is damaged"
    except (OSError, KeyError) as error:
        problem = f"{name} cannot be read ({error})"
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = ", ".join(filter(None, problems))
    if found:
        before = [path for path in checkpoint.path.parent.glob("step_*[0-9]") if path.name < checkpoint.path.name]
        fix = "remove it to go on from the one before" if before else "give another train.run_dir, or move this away"
        raise ConfigError("checkpoint.resume", str(checkpoint.path), found, fix)
    return state
