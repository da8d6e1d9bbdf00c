"""What `launch/slurm/pretrain.sbatch` asks before it starts a run: its folder, its steps, and its whole arguments.

    python -m elas.launch.slurm.batch RANKS ARGUMENTS…

ARGUMENTS are those of `launch/pretrain.py`; the ones that this task of a sweep has follow them. A mistake in them is
one line and status 2 here, before there is any rank that could wait for another.
"""

import os
import sys

from elas.command import exit_status
from elas.errors import UserError
from elas.launch.job import Job, read_arguments
from elas.launch.sweep import of_this_task


def main(argv: list[str]) -> int:
    """Print the run's folder, its steps and its arguments, each ending in a NUL; returns 0."""
    if not argv or not argv[0].isdecimal() or int(argv[0]) < 1:
        given = argv[0] if argv else ""
        raise UserError(f"{given!r}: is no number of ranks; give ELAS_RANKS_PER_NODE a number from 1 up")
    world, given = int(argv[0]), [*argv[1:], *of_this_task()]
    job = read_arguments(given, world, look_at_files=False)
    job = read_arguments([*given, *going_on(job)], world)
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
