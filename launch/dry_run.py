"""`elas train --dry-run`: runs every check of a start and shows the run. Writes nothing, creates no process group."""

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
    """The number of ranks to plan for: `--ranks` if given, else the launcher's.

    Raises:
        UserError: `--ranks` is out of range, or differs from what the launcher started.
    """
    if ranks is None:
        return world
    if not 1 <= ranks <= LARGEST:
        raise UserError(f"--ranks {ranks}: out of range; must be at least 1")
    if world not in (1, ranks):
        raise UserError(f"--ranks {ranks}: the launcher started {world} ranks; leave --ranks out")
    return ranks


def check_data(config: Config) -> None:
    """Run `check_corpus`, and remove the cache folder that it creates to test whether it can."""
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
    """Check that a kernel requested by name is available; `auto` always finds one when the run starts."""
    if config.model.activation == "relu2" and config.sparsity.implementation != "auto":
        from elas.model import kernel

        kernel.chosen(config)


def check_run_dir(config: Config) -> None:
    """Check that the run's folder can be created and written to, by creating and removing a temporary folder there.

    Raises:
        ConfigError: it cannot; with the message of `elas.run_dir.claim`.
    """
    parent = Path(config.train.run_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".elas-dry-run-", dir=parent):
            return
    except OSError as error:
        why = f"cannot be written to ({error.strerror})"
        raise ConfigError("train.run_dir", config.train.run_dir, why, "give another folder") from None


def dry_run(config: Config, world: int, json_file: Path | None, *, shows: bool) -> int:
    """Check a run of `world` ranks and show its parameters, tokens, memory and schedule.

    Args:
        config: as read, not yet validated.
        world: number of ranks.
        json_file: also receives the facts as JSON; None for none.
        shows: whether this process prints.

    Returns:
        Exit status 0.

    Raises:
        UserError: the first error found, the same that a real start would raise.
    """
    from elas import run_dir
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.initial import find_initial
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate
    from elas.engine.deepspeed import check_deepspeed_json
    from elas.plan.muon import check_sub_groups
    from elas.plan.run import run_facts, run_rows
    from elas.train import history
    from elas.train.trackers import check_trackers

    choose_zero_stage(config, world)
    validate(config, world)
    check_sub_groups(config, world)
    check_trackers(config)
    check_data(config)
    resume = find_checkpoint(config)
    find_initial(config, resume)
    check_deepspeed_json(config)
    check_kernel(config)
    check_run_dir(config)
    if (Path(config.train.run_dir) / ".lock").exists():
        run_dir.claim(config).release()  # raises if another run holds the folder
    if not shows:
        return 0
    step, done = resume.step if resume else 0, finished(config, resume)
    changed = history.changes(config, resume) if resume and done is None else {}
    facts = run_facts(config, world, step) | {"changed": changed}
    print(facts_table(run_rows(config, facts)))
    for line in history.lines(changed, step):
        print(line)
    if done is not None:
        print(f"already trained to step {done.step}; nothing to do ({done.checkpoint}, intact by manifest)")
    for line in facts["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    write_json(json_file, facts)
    return 0
