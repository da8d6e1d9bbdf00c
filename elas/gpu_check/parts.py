"""The parts of a check, in the order in which they run.

The tests come last: with a budget that is too small, it is they that are cut, since the other parts say the essential.
"""

from collections.abc import Callable
from dataclasses import dataclass

from elas.gpu_check.setting import Setting

NO_CUDA = "requires a CUDA device"


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        name: as in `worker.MODULES`, and on the command line.
        limit_s: time limit in seconds; a part that exceeds it is wrong.
        least_s: with fewer seconds left it is not started.
        needs_gpu: whether a dry run leaves it out.
        command: makes its command from its setting.
    """

    name: str
    limit_s: float
    least_s: float = 15.0
    needs_gpu: bool = False
    command: Callable[[Setting], list[str]] = Setting.command


DEVICE = Part("device", 60.0, 0.0)
PARTS = [
    Part("kernels", 150.0),
    Part("training", 240.0, 30.0),
    Part("NCCL", 90.0, needs_gpu=True),
    Part("speed", 360.0),
    Part("tests", 480.0, 30.0),
]
