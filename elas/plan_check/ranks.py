"""Ranks of a measurement: started by torchrun below the project's guard, which ends them whatever happens."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from elas.errors import Failure, UserError
from elas.launch.guard.supervise import Supervisor
from elas.launch.local import environment, free_port, launcher_command

JOB = "job.json"
SHAPES = {"cpu": {"preset": "60m", "batch": 4, "seq": 256}, "cuda": {"preset": "1b", "batch": 32, "seq": 256}}
"""What rates are measured with, by device."""


def usable() -> int:
    """GPUs of this machine; without any, the cores that this process may use."""
    from elas import accelerator  # imports torch

    return accelerator.gpus_here() or len(os.sched_getaffinity(0))


def on_ranks(job: str, facts: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Run a job of `elas.plan_check.entry` on ranks of this machine, each with one thread if it has no GPU.

    Args:
        job: its name.
        facts: what it is given, as JSON allows.
        world: number of ranks.

    Returns:
        What each rank returned, in order.

    Raises:
        UserError: the ranks refused the settings; they have printed why.
        Failure: a rank failed.
        KeyboardInterrupt: this process was asked to stop.
    """
    from elas import accelerator

    with tempfile.TemporaryDirectory(prefix="elas-plan-") as name:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps({"job": job, "facts": facts}))
        start = launcher_command("torchrun", world, free_port())
        command = [*start, "-m", "elas.plan_check.entry", name]
        env = environment(world) | ({} if accelerator.has_cuda() else {"OMP_NUM_THREADS": "1"})
        outcome = Supervisor(command, {os.uname().nodename: range(world)}, None, env).run()
        if outcome.asked is not None:
            raise KeyboardInterrupt
        found = [_read(folder / f"rank{rank}.json") for rank in range(world)]
        refused = next((one["error"] for one in found if one and "error" in one), None)
        if refused:
            raise UserError(refused)
        results = [one for one in found if one is not None]
        if len(results) < world:
            missing = next(rank for rank, one in enumerate(found) if one is None)
            raise Failure(f"rank {missing} of {world} failed (launcher's status {outcome.status}); see above")
        return results


def write_result(folder: Path, rank: int, result: dict[str, Any]) -> None:
    """On a rank: hand over its result, whole."""
    partial = folder / f".rank{rank}"
    partial.write_text(json.dumps(result))
    partial.replace(folder / f"rank{rank}.json")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
