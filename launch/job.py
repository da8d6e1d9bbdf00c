"""A run that is to be started: its settings, checked before anything starts, and how it ended, read from its marker."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

from elas.config import Config, load_config, split_overrides, split_settings
from elas.config.arguments import SettingsParser
from elas.errors import UserError


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes:
        config: the settings, validated for `world` ranks.
        arguments: for `launch/pretrain.py`, each value as it was typed.
        world: ranks.
    """

    config: Config
    arguments: list[str]
    world: int

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.train.run_dir)


@dataclass(frozen=True)
class Ending:
    """How a run ended: `done`, `stopped` (it was asked to, and saved), or `failed`."""

    state: str
    step: int | None = None
    checkpoint: str | None = None
    reason: str = ""


def add_options(parser: ArgumentParser) -> None:
    """The options of a run that are no settings, as `elas train` has them."""
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, such as ds_configs/zero1.json")


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Settings, as `--section.key=VALUE`, and everything else.

    Raises:
        ConfigError: an unknown key, or one without a value.
    """
    settings, rest = split_settings(argv)
    return [f"--{key}={value}" for key, value in settings], rest


def read_job(settings: list[str], options, world: int, *, look_at_files: bool = True) -> Job:
    """Read and check a run's settings.

    Args:
        settings: `--section.key=VALUE`, from `split_argv`.
        options: parsed, with those of `add_options`.
        world: ranks.
        look_at_files: also look at the corpus and at what the run's folder holds, which this machine must see.

    Raises:
        UserError: the first thing found wrong.
    """
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate

    overrides, _ = split_overrides(settings)
    arguments = [f"--config={options.config}"] if options.config else []
    if options.deepspeed_config:
        overrides["parallel.deepspeed_config"] = options.deepspeed_config
        arguments.append(f"--deepspeed_config={options.deepspeed_config}")
    config = load_config(options.config, overrides)
    choose_zero_stage(config, world)
    validate(config, world)
    if look_at_files:
        from elas.checkpoint.choose import find_checkpoint
        from elas.checkpoint.initial import find_initial
        from elas.data.corpus import check_corpus

        check_corpus(config)
        find_initial(config, find_checkpoint(config))
    return Job(config, [*arguments, *settings], world)


def input_files(config: Config) -> tuple[str, ...]:
    """The token files that a run reads."""
    from elas.data.corpus import parse_blend

    prefixes = []
    for key, value in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        prefixes += parse_blend(key, value)[0] if value is not None else ()
    return tuple(f"{prefix}{end}" for prefix in prefixes for end in (".idx", ".bin"))


def markers(run_dir: Path) -> dict[str, str]:
    """The text of the markers that a run has left, by name."""
    found = {}
    for name in ("DONE", "REQUEUE"):
        try:
            found[name] = (run_dir / name).read_text()
        except OSError:
            continue
    return found


def how_it_ended(job: Job, before: dict[str, str], after: dict[str, str], status: int) -> Ending:
    """Judge a run by the marker of its rank 0, and never by an exit status alone.

    Args:
        job: the run.
        before: its markers before it was started: an old one says nothing about this start,
        after: and when everything had ended.
        status: exit status of whatever started it.

    Returns:
        `done` also where there was nothing left to do.
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
    """Refuse a number that cannot be; None is whatever the default is.

    Raises:
        UserError: it is too small or too large.
    """
    if value is not None and (value < least or (most is not None and value > most)):
        fix = f"give {least} or more" if most is None else f"give a number from {least} to {most}"
        raise UserError(f"{option} {value}: cannot be; {fix}")


def shared_arguments(options) -> list[str]:
    """The options of `elas.launch.job.add_options` as arguments again."""
    given = {"--config": options.config, "--deepspeed_config": options.deepspeed_config}
    return [f"{name}={value}" for name, value in given.items() if value]


def read_arguments(argv: list[str], world: int, *, look_at_files: bool = True) -> Job:
    """The run that arguments of `launch/pretrain.py` describe, for `world` ranks.

    Raises:
        UserError: the first thing found wrong.
    """
    settings, rest = split_argv(argv)
    example = "sbatch --nodes 2 launch/slurm/pretrain.sbatch --config F"
    parser = SettingsParser("pretrain.sbatch", "Train under SLURM.", example)
    add_options(parser)
    options = parser.parse_args(rest)
    job = read_job(settings, options, world, look_at_files=look_at_files)
    return job if options.json is None else Job(job.config, [*job.arguments, f"--json={options.json}"], world)
