"""Sweeps: a file with one run per line, whose settings follow, and so override, those shared by all runs."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from elas.errors import UserError
from elas.launch.job import Job, read_arguments

VARIABLE, TASK = "ELAS_SWEEP", "SLURM_ARRAY_TASK_ID"


def read_sweep(path: Path) -> list[list[str]]:
    """Read a sweep.

    Args:
        path: one run per line: arguments of `launch/pretrain.py`, quoted as for a shell; nothing is expanded.

    Returns:
        The arguments of each run, in line order.

    Raises:
        UserError: the file is unreadable or empty, or a line is empty or has an unbalanced quote.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        fix = "give a file with one line of settings per run"
        raise UserError(f"--sweep {path}: cannot be read ({why}); {fix}") from None
    if not lines:
        raise UserError(f"--sweep {path}: is empty; write the settings of one run on each line")
    return [_words(path, number, line) for number, line in enumerate(lines, 1)]


def _words(path: Path, number: int, line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"--sweep {path}: line {number}: {error}; fix the quotes") from None
    if not words:
        raise UserError(f"--sweep {path}: line {number} is empty; remove it, each line is one run")
    return words


def of_this_task(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The arguments of this SLURM array task: its line of the file ELAS_SWEEP; empty if the variable is unset.

    Raises:
        UserError: the job is not an array, the line does not exist, or the file is invalid.
    """
    path, task = environment.get(VARIABLE), environment.get(TASK)
    if not path:
        return []
    if task is None:
        raise UserError(f"{VARIABLE}={path}: this job is not an array; submit it with sbatch --array=0-N")
    runs = read_sweep(Path(path))
    if not task.isdecimal() or int(task) >= len(runs):
        why = f"{path} has {len(runs)} lines, for tasks 0 to {len(runs) - 1}"
        raise UserError(f"{TASK}={task}: {why}; submit with --array=0-{len(runs) - 1}")
    return runs[int(task)]


def read_runs(path: Path, given: list[str], world: int) -> list[Job]:
    """Read and check the runs of a sweep; each line's arguments are appended to `given`.

    Raises:
        UserError: the first error found, with its line; or two runs share a folder.
    """
    jobs: list[Job] = []
    for number, line in enumerate(read_sweep(path), 1):
        try:
            jobs.append(read_arguments([*given, *line], world))
        except UserError as error:
            raise UserError(f"--sweep {path}: line {number}: {error}") from None
    folders = [job.run_dir.resolve() for job in jobs]
    for number, folder in enumerate(folders, 1):
        if folder in folders[: number - 1]:
            both = f"lines {folders.index(folder) + 1} and {number} both train in {jobs[number - 1].run_dir}"
            raise UserError(f"--sweep {path}: {both}; give each line its own --train.run_dir")
    return jobs
