"""What each rank of a measurement runs: `python -m elas.plan_check.entry FOLDER`, started by `ranks.py`."""

import importlib
import json
import os
import sys
from pathlib import Path

from elas import accelerator
from elas.command import end_process
from elas.errors import UserError
from elas.launch.guard.leash import end_with_launcher
from elas.launch.rank_environment import choose_interface
from elas.plan_check.ranks import JOB, write_result

JOBS = {"rates": "elas.plan_check.rates_rank", "check": "elas.plan_check.check_rank"}


def main(folder: Path) -> int:
    """Run the folder's job on this rank; returns the exit status."""
    end_with_launcher()
    choose_interface()
    accelerator.prepare()
    import torch

    if not accelerator.has_cuda():
        torch.set_num_threads(1)
    job, rank = json.loads((folder / JOB).read_text()), int(os.environ["RANK"])
    try:
        result = importlib.import_module(JOBS[job["job"]]).on_rank(job["facts"])
    except UserError as error:  # the same on every rank; the first process prints it
        write_result(folder, rank, {"error": str(error)})
        return 0
    write_result(folder, rank, result)
    from elas import parallel

    torch.distributed.barrier()
    parallel.leave()
    return 0


if __name__ == "__main__":
    end_process(main(Path(sys.argv[1])))
