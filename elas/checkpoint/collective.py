"""What the ranks that read one checkpoint do together: check its bytes, and agree on whether reading failed."""

import pickle
from collections.abc import Callable

import torch.distributed as dist

from elas.checkpoint.folder import Checkpoint, damaged_files, unusable

FIX = "give another checkpoint"


def damage(checkpoint: Checkpoint) -> list[str]:
    """Compare every byte of a checkpoint with its checksums, the ranks sharing the files; every rank must call it.

    Returns:
        One line for each damaged file, the same on every rank.
    """
    mine = sorted(checkpoint.manifest["files"])[dist.get_rank() :: dist.get_world_size()]
    return gather_problems(damaged_files(checkpoint, mine))


def load_on_all_ranks(load: Callable[[], None], checkpoint: Checkpoint, key: str | None = None) -> None:
    """Call `load` on every rank.

    Raises:
        UserError: it failed on a rank (as a `ConfigError` of the setting `key`, if given); raised on every rank.
    """
    problems = []
    try:
        load()
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, ValueError) as error:
        problems = [f"rank {dist.get_rank()}: {type(error).__name__}: {error}"]
    problems = gather_problems(problems)
    if problems:
        raise unusable(checkpoint.path, problems[0], FIX, key)


def gather_problems(problems: list[str]) -> list[str]:
    """The problems of all ranks, returned on all ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    return [problem for of_rank in gathered for problem in of_rank]
