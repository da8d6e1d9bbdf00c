"""The entry point of a training run; the deepspeed launcher, torchrun, srun and `elas train` all run this file.

    elas train --config 60m --data.train corpus
    deepspeed --num_gpus 2 launch/pretrain.py --config run.yaml --deepspeed_config ds_configs/zero1.json
    torchrun --nproc_per_node 2 launch/pretrain.py --config run.yaml --parallel.tensor 2
    srun … python launch/pretrain.py --config run.yaml

Errors in the settings, the files or the number of ranks are reported in one line, with exit status 2, before any
process group exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from elas.command import end_process, exit_status
from elas.config import Config, load_config, split_overrides
from elas.config.arguments import SettingsParser
from elas.config.writing import to_yaml
from elas.console import Console, Heartbeat
from elas.errors import UserError
from elas.files import write_json
from elas.launch.export_at_end import export_at_end
from elas.launch.guard.leash import end_with_launcher
from elas.launch.rank_environment import choose_interface, is_first_rank, rank_and_world, srun_environment
from elas.train.result import finished

if TYPE_CHECKING:  # these import torch
    from filelock import BaseFileLock

    from elas.checkpoint.folder import Checkpoint
    from elas.checkpoint.initial import Initial


def parse(argv: list[str]) -> tuple[Config, dict]:
    """Read the command line.

    Args:
        argv: `--config`, `--deepspeed_config`, and `--section.key value` overrides.

    Returns:
        The configuration, and the other options as a dict.

    Raises:
        UserError: an unknown option or key, or an invalid value.
    """
    overrides, rest = split_overrides(argv)
    parser = SettingsParser(
        "elas train",
        "Train a model. For several ranks: elas launch, or launch/pretrain.py under deepspeed, torchrun or srun.",
        "elas train --config 60m --data.train data/c4 --train.run_dir runs/60m",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, such as ds_configs/zero1.json")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="passed by launchers; ignored")
    parser.add_argument(
        "--show-config",
        action="store_true",
        help="print the whole configuration as YAML (--json FILE: as JSON too) and exit",
    )
    dry = "check everything, show parameters, tokens, epochs, memory and schedule, and exit"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: as if started on N ranks")
    options = vars(parser.parse_args(rest))
    if options["ranks"] is not None and not options["dry_run"]:
        raise UserError(f"--ranks {options['ranks']}: only with --dry-run; elas launch local --ranks N starts N ranks")
    if options["deepspeed_config"]:
        overrides["parallel.deepspeed_config"] = options["deepspeed_config"]
    return load_config(options["config"], overrides), options


def main(argv: list[str]) -> int:
    """Run `elas train`; returns 0, or raises `UserError` for mistakes in settings, files or the number of ranks."""
    end_with_launcher()
    with Heartbeat("starting", shows=is_first_rank()) as heartbeat:
        ready = _prepare(argv, heartbeat)
        if ready is None:
            return 0
        with _interrupted_before_training(ready.resume):
            from elas import parallel
            from elas.train.loop import run

            train = ready.config.train
            layout = parallel.initialize(ready.config.parallel, seed=train.seed, timeout_s=train.timeout_seconds)
    result = run(ready.config, layout, ready.resume, ready.initial)
    parallel.leave()
    if ready.lock is not None:  # on rank 0
        ready.lock.release()
        if not result.stopped:
            Console().say(result.done_line(heartbeat.seconds))
        exported = export_at_end(ready.config, result)
        write_json(ready.json, {**dataclasses.asdict(result), **ready.facts, **exported})
    return 0


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A checked run, ready to start."""

    config: Config
    resume: Checkpoint | None
    initial: Initial | None
    lock: BaseFileLock | None
    json: Path | None
    facts: dict


def _prepare(argv: list[str], heartbeat: Heartbeat) -> _Ready | None:
    """Run all checks and import what training needs; None if nothing is left to do (`--dry-run`, a finished run).

    Raises:
        UserError: an error in the settings, the files or the number of ranks.
    """
    config, options = parse(argv)
    from elas.config.rules import validate

    if options["show_config"]:
        validate(config, None)
        print(to_yaml(config), end="")
        write_json(options["json"], config.to_dict())
        return None
    srun_environment()
    rank, world = rank_and_world()
    if options["dry_run"]:
        from elas.launch.dry_run import dry_run, world_of

        dry_run(config, world_of(options["ranks"], world), options["json"], shows=rank == 0)
        return None
    choose_interface()
    from elas import run_dir
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.initial import find_initial
    from elas.config.deepspeed import choose_zero_stage
    from elas.data.corpus import check_corpus
    from elas.plan.muon import check_sub_groups
    from elas.train.trackers import check_trackers

    choose_zero_stage(config, world)
    validate(config, world)
    check_sub_groups(config, world)
    check_trackers(config)
    check_corpus(config)
    resume = find_checkpoint(config)
    initial = find_initial(config, resume)
    from elas import accelerator  # imports torch, which takes seconds: after the checks of paths

    accelerator.prepare()
    facts = {"world_size": world, "run_dir": config.train.run_dir}
    done = finished(config, resume)
    if done is not None:
        if rank == 0:
            Console().say(f"already trained to step {done.step}; nothing to do ({done.checkpoint}, intact by manifest)")
            facts |= export_at_end(config, done)  # asked for later, or the run ended before it
            write_json(options["json"], {**dataclasses.asdict(done), **facts})
        return None
    is_new = not Path(config.train.run_dir).exists()
    lock = run_dir.claim(config, starts=True) if rank == 0 else None  # before the imports: `elas watch` sees the start
    if rank == 0:
        Console().say("loading Megatron-core and DeepSpeed")  # seconds, or a minute on a busy machine
        heartbeat.begin("loading Megatron-core and DeepSpeed")
    with _interrupted_before_training(resume):
        _import_all(config, lock if is_new else None)
    if rank == 0 and resume is None:  # else the loop does, when it knows that the checkpoint is intact
        from elas.train.lines import warn

        warn(config, 0)
    return _Ready(config, resume, initial, lock, options["json"], facts)


def _import_all(config: Config, created: BaseFileLock | None) -> None:
    """Import and compile what training needs.

    Args:
        config: the run's.
        created: the lock of a run's folder that this start created; after an error no trace of it is left.
    """
    from elas.engine.prebuild import prebuild
    from elas.run_dir import withdraw

    try:
        prebuild(config)
    except UserError:  # a kernel that cannot be had here
        if created is not None:
            withdraw(config, created)
        raise


@contextlib.contextmanager
def _interrupted_before_training(resume: Checkpoint | None) -> Iterator[None]:
    """On Ctrl-C before the run handles signals itself, report what is saved."""
    try:
        yield
    except KeyboardInterrupt:
        from elas.train.standing import Standing

        raise KeyboardInterrupt(Standing.at_start(resume).lost()) from None


if __name__ == "__main__":
    end_process(exit_status(main, sys.argv[1:]))
