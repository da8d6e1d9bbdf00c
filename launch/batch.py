"""What `launch/slurm/pretrain.sbatch` asks before it starts a run: its folder, its steps, and its whole arguments.

    python -m elas.launch.batch RANKS ARGUMENTS…

ARGUMENTS are those of `launch/pretrain.py`; the ones that this task of a sweep has follow them. A mistake in them is
one line and status 2 here, before there is any rank that could wait for another.
"""

import os
import sys
from pathlib import Path

from elas.cli import Parser, exit_status
from elas.errors import UserError
from elas.launch.job import Job, add_options, read_job, split_argv
from elas.launch.sweep import of_this_task, read_sweep


def read(argv: list[str], world: int, *, look_at_files: bool = True) -> Job:
    """The run that arguments of `launch/pretrain.py` describe, for `world` ranks.

    Raises:
        UserError: the first thing found wrong.
    """
    settings, rest = split_argv(argv)
    example = "sbatch --nodes 2 launch/slurm/pretrain.sbatch --config F"
    parser = Parser("pretrain.sbatch", "Train under SLURM.", example, settings=True)
    add_options(parser)
    options = parser.parse_args(rest)
    job = read_job(settings, options, world, look_at_files=look_at_files)
    return job if options.json is None else Job(job.config, [*job.arguments, f"--json={options.json}"], world)


def read_runs(path: Path, given: list[str], world: int) -> list[Job]:
    """The runs of a sweep's file, whose lines follow the arguments `given` to all of them.

    Raises:
        UserError: the first thing found wrong, with its line; or two runs in one folder.
    """
    jobs: list[Job] = []
    for number, line in enumerate(read_sweep(path), 1):
        try:
            jobs.append(read([*given, *line], world))
        except UserError as error:
            raise UserError(f"--sweep {path}: line {number}: {error}") from None
    folders = [job.run_dir.resolve() for job in jobs]
    for number, folder in enumerate(folders, 1):
        if folder in folders[: number - 1]:
            both = f"lines {folders.index(folder) + 1} and {number} both train in {jobs[number - 1].run_dir}"
            raise UserError(f"--sweep {path}: {both}; give each line its own --train.run_dir")
    return jobs


def shared_arguments(options) -> list[str]:
    """The options of `elas.launch.job.add_options` as arguments again."""
    given = {"--config": options.config, "--deepspeed_config": options.deepspeed_config}
    return [f"{name}={value}" for name, value in given.items() if value]


def main(argv: list[str]) -> int:
    """Print the run's folder, its steps and its arguments, each ending in a NUL; returns 0."""
    if not argv or not argv[0].isdecimal() or int(argv[0]) < 1:
        given = argv[0] if argv else ""
        raise UserError(f"{given!r}: is no number of ranks; give ELAS_RANKS_PER_NODE a number from 1 up")
    world, given = int(argv[0]), [*argv[1:], *of_this_task()]
    job = read(given, world, look_at_files=False)
    job = read([*given, *going_on(job)], world)
    for word in (str(job.run_dir), str(job.config.train.steps), *job.arguments):
        sys.stdout.write(f"{word}\0")
    return 0


def going_on(job: Job) -> list[str]:
    """What a job that is started again has to be told: to go on with its own run, however its first start began."""
    resume, again = job.config.checkpoint.resume, int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    has_saved = any((job.run_dir / "checkpoints").glob("step_*"))
    return ["--checkpoint.resume=auto"] if again and resume != "auto" and (resume == "none" or has_saved) else []


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
