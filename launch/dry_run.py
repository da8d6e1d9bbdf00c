"""`elas train --dry-run`: every check of a start, and what the run would be. Writes nothing, makes no process group."""

import sys
import tempfile
from pathlib import Path

from elas.config import Config
from elas.config.kinds import LARGEST
from elas.console import facts_table
from elas.errors import ConfigError, UserError
from elas.files import write_json
from elas.train.result import finished


def world_of(ranks: int | None, world: int) -> int:
    """Ranks to plan for: those of `--ranks`, else of the launcher.

    Raises:
        UserError: they differ, or are no number of ranks.
    """
    if ranks is None:
        return world
    if not 1 <= ranks <= LARGEST:
        raise UserError(f"--ranks {ranks}: out of range; give 1 or more")
    if world not in (1, ranks):
        raise UserError(f"--ranks {ranks}: the launcher started {world} ranks; leave --ranks out")
    return ranks


def check_data(config: Config) -> None:
    """`check_corpus`, with the cache folder that it makes, to see whether it can, removed again."""
    from elas.data.corpus import check_corpus

    cache = Path(config.data.cache).absolute() if config.data.cache else None
    new = [path for path in (cache, *cache.parents) if not path.exists()] if cache else []
    try:
        check_corpus(config)
    finally:
        for path in new:  # innermost first
            if path.is_dir():
                path.rmdir()


def check_kernel(config: Config) -> None:
    """A kernel that is asked for by name can be had; `auto` finds one always, at the start."""
    if config.model.activation == "relu2" and config.sparsity.implementation != "auto":
        import torch

        from elas.kernels.relu2_24 import Relu24Options, select

        options = Relu24Options.of(config.sparsity, sparse=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        select(options, device, getattr(torch, config.train.dtype), config.sparsity.implementation)


def check_run_dir(config: Config) -> None:
    """The run's folder can be made and written to, tried with a folder that is removed again.

    Raises:
        ConfigError: it cannot, as `elas.run_dir.claim` would say it.
    """
    there = Path(config.train.run_dir).absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".elas-dry-run-", dir=there):
            return
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
        raise ConfigError("train.run_dir", config.train.run_dir, why, "give another folder") from None


def dry_run(config: Config, world: int, json_file: Path | None, *, shows: bool) -> int:
    """Check a run of `world` ranks and show what it would be.

    Args:
        config: as read.
        world: ranks.
        json_file: where the facts also go.
        shows: whether this process prints.

    Returns:
        Exit status 0.

    Raises:
        UserError: the first thing found wrong, as a start would.
    """
    from elas import run_dir
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.initial import find_initial
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate
    from elas.engine.deepspeed import check_deepspeed_json
    from elas.plan.run import run_facts, run_rows

    choose_zero_stage(config, world)
    validate(config, world)
    check_data(config)
    resume = find_checkpoint(config)
    find_initial(config, resume)
    check_deepspeed_json(config)
    check_kernel(config)
    check_run_dir(config)
    if (Path(config.train.run_dir) / ".lock").exists():
        run_dir.claim(config).release()  # another run's?
    if not shows:
        return 0
    facts = run_facts(config, world, resume.step if resume else 0)
    print(facts_table(run_rows(config, facts)))
    if finished(config, resume) is not None:
        print(f"already trained to step {resume.step}; nothing to do ({resume.path})")
    for line in facts["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    write_json(json_file, facts)
    return 0
