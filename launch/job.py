"""A run to launch: its settings, validated before anything starts, and its outcome, read from its markers."""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elas.config import Config, load_config, split_overrides, split_settings
from elas.config.arguments import SettingsParser
from elas.errors import UserError


@dataclass(frozen=True)
class Job:
    """A validated run.

    Attributes:
        config: the settings, validated for `world` ranks.
        arguments: arguments of `launch/pretrain.py`, each value as the user typed it.
        world: number of ranks.
    """

    config: Config
    arguments: list[str]
    world: int

    @property
    def run_dir(self) -> Path:
        """`train.run_dir`."""
        return Path(self.config.train.run_dir)

    def new_stop(self) -> Callable[[], bool]:
        """A function that says whether the run has stopped and saved since this call, by its marker `REQUEUE`."""
        before = markers(self.run_dir).get("REQUEUE")
        return lambda: markers(self.run_dir).get("REQUEUE") not in (None, before)


@dataclass(frozen=True)
class Ending:
    """Outcome of a run: `done`, `stopped` (on request, after saving), or `failed`."""

    state: str
    step: int | None = None
    checkpoint: str | None = None
    reason: str = ""


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `elas train` that are not settings."""
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, such as ds_configs/zero1.json")


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the settings, as `--section.key=VALUE`, from all other arguments.

    Raises:
        ConfigError: a key is unknown or has no value.
    """
    settings, rest = split_settings(argv)
    return [f"--{key}={value}" for key, value in settings], rest


def read_job(settings: list[str], options, world: int, *, look_at_files: bool = True) -> Job:
    """Read and check a run's settings.

    Args:
        settings: `--section.key=VALUE`, from `split_argv`.
        options: parsed options, including those of `add_options`.
        world: number of ranks.
        look_at_files: also check the corpus and the run's checkpoints, which must be visible on this machine.

    Raises:
        UserError: the first error found.
    """
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate
    from elas.plan.muon import check_sub_groups

    overrides, _ = split_overrides(settings)
    arguments = [f"--config={options.config}"] if options.config else []
    if options.deepspeed_config:
        overrides["parallel.deepspeed_config"] = options.deepspeed_config
        arguments.append(f"--deepspeed_config={options.deepspeed_config}")
    config = load_config(options.config, overrides)
    choose_zero_stage(config, world)
    validate(config, world)
    check_sub_groups(config, world)
    if look_at_files:
        from elas.checkpoint.choose import find_checkpoint
        from elas.checkpoint.initial import find_initial
        from elas.data.corpus import check_corpus

        check_corpus(config)
        find_initial(config, find_checkpoint(config))
    return Job(config, [*arguments, *settings], world)


def check_paths(settings: list[str], options) -> None:
    """Raise `UserError` if a configuration file or a token file is not there, without importing torch."""
    from elas.data.corpus import parse_blend
    from elas.data.token_files import check_exists

    config = load_config(options.config, split_overrides(settings)[0])
    for key, value in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        for prefix in parse_blend(key, value)[0] if value is not None else ():
            check_exists(key, prefix)


def input_files(config: Config) -> tuple[str, ...]:
    """Paths of the token files (`.idx` and `.bin`) that a run reads."""
    from elas.data.corpus import parse_blend

    prefixes = []
    for key, value in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        prefixes += parse_blend(key, value)[0] if value is not None else ()
    return tuple(f"{prefix}{end}" for prefix in prefixes for end in (".idx", ".bin"))


def markers(run_dir: Path) -> dict[str, str]:
    """The contents of the markers `DONE` and `REQUEUE` in a run's folder, by name; missing ones are left out."""
    found = {}
    for name in ("DONE", "REQUEUE"):
        try:
            found[name] = (run_dir / name).read_text()
        except OSError:
            continue
    return found


def how_it_ended(job: Job, before: dict[str, str], after: dict[str, str], status: int) -> Ending:
    """Determine a run's outcome from the marker that its rank 0 wrote, never from an exit status alone.

    Args:
        job: the run.
        before: its markers before the start; an unchanged one is from an earlier start and is ignored.
        after: its markers after all processes ended.
        status: exit status of the launcher.

    Returns:
        The outcome; `done` also if the run was already complete and exited at once.
    """
    new = {name: text for name, text in after.items() if before.get(name) != text}
    for name, state in (("DONE", "done"), ("REQUEUE", "stopped")):
        facts = _facts(new.get(name))
        if facts:
            return Ending(state, facts.get("step"), facts.get("checkpoint"), facts.get("stopped", ""))
    facts = _facts(after.get("DONE"))
    if status == 0 and facts.get("step") == job.config.train.steps:
        return Ending("done", facts["step"], facts.get("checkpoint"), "there was nothing left to do")
    return Ending("failed")


def _facts(text: str | None) -> dict:
    try:
        facts = json.loads(text or "{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def whole_number(option: str, value: int | None, least: int = 1, most: int | None = None) -> None:
    """Check that an option's value is from `least` to `most`; None (option not given) passes.

    Raises:
        UserError: the value is out of range.
    """
    if value is not None and (value < least or (most is not None and value > most)):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{option} {value}: must be {bounds}")


def shared_arguments(options) -> list[str]:
    """Turn the parsed options of `add_options` back into arguments."""
    given = {"--config": options.config, "--deepspeed_config": options.deepspeed_config}
    return [f"{name}={value}" for name, value in given.items() if value]


def read_arguments(argv: list[str], world: int, *, look_at_files: bool = True) -> Job:
    """Parse and check arguments of `launch/pretrain.py` for `world` ranks.

    Raises:
        UserError: the first error found.
    """
    settings, rest = split_argv(argv)
    example = "sbatch --nodes 2 launch/slurm/pretrain.sbatch --config F"
    parser = SettingsParser("pretrain.sbatch", "Train under SLURM.", example)
    add_options(parser)
    options = parser.parse_args(rest)
    job = read_job(settings, options, world, look_at_files=look_at_files)
    return job if options.json is None else Job(job.config, [*job.arguments, f"--json={options.json}"], world)


def add_host_options(parser: ArgumentParser) -> None:
    """Add the options that concern the hosts of a run: what each must have free, and what is forwarded to it."""
    parser.add_argument("--min-shm-gb", type=float, metavar="X", help="GiB of free /dev/shm (default: 66 MiB a rank)")
    parser.add_argument("--min-disk-gb", type=float, default=1.0, metavar="X", help="GiB of free disk (default: 1)")
    what = "variables to forward over ssh: one NAME, pattern, or NAME=VALUE per line"
    parser.add_argument("--env-file", type=Path, action="append", default=[], metavar="FILE", help=what)
