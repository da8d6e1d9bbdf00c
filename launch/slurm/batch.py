"""Prints a run's folder, steps and complete arguments for `launch/slurm/pretrain.sbatch`.

    python -m elas.launch.slurm.batch RANKS ARGUMENTS…

ARGUMENTS are those of `launch/pretrain.py`; in a sweep, those of this array task are appended. Errors in them are
reported here in one line, with status 2, before any rank starts and could wait for another.
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
        raise UserError(f"{given!r}: is not a number of ranks; ELAS_RANKS_PER_NODE must be at least 1")
    world, given = int(argv[0]), [*argv[1:], *of_this_task()]
    job = read_arguments(given, world, look_at_files=False)
    job = read_arguments([*given, *resume_arguments(job)], world)
    for word in (str(job.run_dir), str(job.config.train.steps), *job.arguments):
        sys.stdout.write(f"{word}\0")
    return 0


def resume_arguments(job: Job) -> list[str]:
    """Arguments that make a requeued job resume its own run, whatever `checkpoint.resume` its first start had."""
    resume, again = job.config.checkpoint.resume, int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    has_saved = any((job.run_dir / "checkpoints").glob("step_*"))
    return ["--checkpoint.resume=auto"] if again and resume != "auto" and (resume == "none" or has_saved) else []


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
