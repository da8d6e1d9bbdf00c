"""Checks for a usable SLURM cluster before anything is submitted."""

import shutil
import subprocess

from elas.errors import UserError


def check_slurm(what: str, instead: str, *, partition: str | None, partition_option: str, nodes: int = 1) -> None:
    """Check that sbatch exists, the cluster answers, and the partition has enough nodes.

    Args:
        what: the option or command that requires SLURM, for messages.
        instead: an alternative without SLURM, for messages.
        partition: required partition; None for the cluster's default.
        partition_option: the option that sets it, for messages.
        nodes: nodes per job.

    Raises:
        UserError: one of these checks fails.
    """
    fix = f"run it on a login node, or use {instead}"
    if shutil.which("sbatch") is None:
        raise UserError(f"{what}: sbatch is not installed on this machine; {fix}")
    try:
        listed = subprocess.run(["sinfo", "-h", "-o", "%P %D"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: the SLURM cluster does not answer within 60 s; {fix}") from None
    if listed.returncode:
        why = (listed.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{what}: the SLURM cluster does not answer ({why}); {fix}")
    check_partition(listed.stdout, partition, partition_option, nodes)


def check_partition(listed: str, partition: str | None, option: str, nodes: int) -> None:
    """Raise `UserError` if a partition does not exist or has fewer nodes than a job needs.

    Args:
        listed: output of `sinfo -h -o '%P %D'`: partitions and their nodes; the default's name ends in `*`.
        partition: a partition, or several separated by commas; None for the default.
        option: the option that sets it, for messages.
        nodes: nodes per job.
    """
    sizes: dict[str, int] = {}
    usual = None
    for name, number in (line.split() for line in listed.splitlines()):
        usual = name.removesuffix("*") if name.endswith("*") else usual
        sizes[name.removesuffix("*")] = sizes.get(name.removesuffix("*"), 0) + int(number)
    names = partition.split(",") if partition else [usual] if usual else []
    for name in names:
        if name not in sizes:
            raise UserError(f"{option} {name}: no such partition; give one of {', '.join(sorted(sizes))}")
    most = max((sizes[name] for name in names), default=None)
    if most is not None and nodes > most:
        raise UserError(f"--nodes {nodes}: partition {','.join(names)} has {most}; give fewer")
