"""`export.at_end`: the Hugging Face folder of a completed run."""

import os
import subprocess
import sys
from pathlib import Path

from elas.config import Config
from elas.console import Console
from elas.train.result import RunResult

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_LOCALID")


def export_at_end(config: Config, result: RunResult) -> dict[str, str]:
    """Run `elas export hf` on a completed run's last checkpoint; rank 0 calls it, after all ranks have left the groups.

    A process of its own does it, because this one's process groups were those of the run. What it prints is printed
    here. If it fails, the run is complete all the same: a line says how to export again.

    Returns:
        `export`: the folder; empty if there is none.
    """
    form = config.export.at_end
    if form == "none" or result.stopped or result.checkpoint is None:
        return {}
    target = Path(config.train.run_dir) / "exports" / f"step_{result.step:08d}-{form}"
    if target.exists():
        return {"export": str(target)}
    command = ["export", "hf", "--checkpoint", result.checkpoint, "--out", str(target), "--form", form]
    Console().say(f"elas {' '.join(command)}")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    done = subprocess.run([sys.executable, "-m", "elas.cli", *command], env=environment, check=False)
    if done.returncode:
        Console("err").say(f"warning: no export (status {done.returncode}); again: elas {' '.join(command)}")
        return {}
    return {"export": str(target)}
