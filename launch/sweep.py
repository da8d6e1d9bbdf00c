"""A sweep: one file, a run on every line, whose settings come after those that all runs share."""

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
        path: arguments of `launch/pretrain.py`, a line for each run, quoted as for a shell; nothing is expanded.

    Returns:
        The arguments of each run, in the order of the lines.

    Raises:
        UserError: unreadable, no lines, an empty one, or one with a quote too many.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise UserError(f"--sweep {path}: cannot be read ({why}); give a file with a line of settings a run") from None
    if not lines:
        raise UserError(f"--sweep {path}: holds no line; write the settings of a run on each")
    return [_words(path, number, line) for number, line in enumerate(lines, 1)]


def _words(path: Path, number: int, line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"--sweep {path}: line {number}: {error}; fix the quotes") from None
    if not words:
        raise UserError(f"--sweep {path}: line {number} is empty; take it out, each line is a run")
    return words


def of_this_task(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The arguments of this task of an array, as ELAS_SWEEP gives them; none without it.

    Raises:
        UserError: no array, no such line, or what `read_sweep` finds.
    """
    path, task = environment.get(VARIABLE), environment.get(TASK)
    if not path:
        return []
    if task is None:
        raise UserError(f"{VARIABLE}={path}: this job is no array; submit it with sbatch --array=0-N")
    runs = read_sweep(Path(path))
    if not task.isdecimal() or int(task) >= len(runs):
        why = f"{path} has {len(runs)} lines, for tasks 0 to {len(runs) - 1}"
        raise UserError(f"{TASK}={task}: {why}; submit with --array=0-{len(runs) - 1}")
    return runs[int(task)]


def read_runs(path: Path, given: list[str], world: int) -> list[Job]:
    """The runs of a sweep's file, whose lines follow the arguments `given` to all of them.

    Raises:
        UserError: the first thing found wrong, with its line; or two runs in one folder.
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
