"""The entry point of an evaluation on one or several ranks; torchrun, srun and `elas eval` all run this file.

torchrun --nproc_per_node 2 launch/evaluate.py --checkpoint runs/60m --parallel.tensor 2
"""

import sys

from elas.command import end_process, exit_status
from elas.evaluate import cli
from elas.launch.guard.leash import end_with_launcher
from elas.launch.rank_environment import choose_interface, rank_and_world, srun_environment


def main(argv: list[str]) -> int:
    """Run `elas eval` on the ranks that a launcher started; returns the exit status, raises `UserError`."""
    end_with_launcher()
    srun_environment()
    rank, world = rank_and_world()
    choose_interface()
    return cli.main(argv, rank, world)


if __name__ == "__main__":
    end_process(exit_status(main, sys.argv[1:]))
