"""Whether there is a SLURM to give work to: asked before anything is submitted."""

import shutil
import subprocess

from elas.errors import UserError


def check_slurm(what: str, instead: str, *, partition: str | None, partition_option: str, nodes: int = 1) -> None:
    """Look for sbatch, for a cluster that answers, and for a partition with enough nodes.

    Args:
        what: the option or command that needs SLURM, for messages.
        instead: what can be used in its place.
        partition: must exist; None where the cluster's own default will do.
        partition_option: the option that names it.
        nodes: how many one job wants.

    Raises:
        UserError: one of them is not there.
    """
    fix = f"run it on a login node, or use {instead}"
    if shutil.which("sbatch") is None:
        raise UserError(f"{what}: there is no sbatch on this machine; {fix}")
    try:
        listed = subprocess.run(["sinfo", "-h", "-o", "%P %D"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: no cluster answers within 60 s; {fix}") from None
    if listed.returncode:
        why = (listed.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{what}: no cluster answers ({why}); {fix}")
    check_partition(listed.stdout, partition, partition_option, nodes)


def check_partition(listed: str, partition: str | None, option: str, nodes: int) -> None:
    """Raise `UserError` where SLURM would never give so many nodes.

    Args:
        listed: partitions and their nodes, as `sinfo -h -o '%P %D'` prints them: the default's name ends in `*`.
        partition: one, or several with commas between; None for the default.
        option: the option that names it.
        nodes: how many one job wants.
    """
    sizes: dict[str, int] = {}
    usual = None
    for name, number in (line.split() for line in listed.splitlines()):
        usual = name.removesuffix("*") if name.endswith("*") else usual
        sizes[name.removesuffix("*")] = sizes.get(name.removesuffix("*"), 0) + int(number)
    names = partition.split(",") if partition else [usual] if usual else []
    for name in names:
        if name not in sizes:
            raise UserError(f"{option} {name}: there is none; there are {', '.join(sorted(sizes))}")
    most = max((sizes[name] for name in names), default=None)
    if most is not None and nodes > most:
        raise UserError(f"--nodes {nodes}: partition {','.join(names)} has {most}; give fewer")
