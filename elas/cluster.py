"""Whether there is a SLURM to give work to: asked before anything is submitted."""

import shutil
import subprocess

from elas.errors import UserError


def check_slurm(what: str, instead: str, *, partition: str | None, partition_option: str) -> None:
    """Look for sbatch, for a cluster that answers, and for a partition.

    Args:
        what: the option or command that needs SLURM, for messages.
        instead: what can be used in its place.
        partition: must exist; None where the cluster's own default will do.
        partition_option: the option that names it.

    Raises:
        UserError: one of the three is not there.
    """
    fix = f"run it on a login node, or use {instead}"
    if shutil.which("sbatch") is None:
        raise UserError(f"{what}: there is no sbatch on this machine; {fix}")
    try:
        listed = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: no cluster answers within 60 s; {fix}") from None
    if listed.returncode:
        why = (listed.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{what}: no cluster answers ({why}); {fix}")
    names = sorted(set(listed.stdout.split()))
    for name in partition.split(",") if partition else ():
        if name not in names:
            raise UserError(f"{partition_option} {name}: there is none; there are {', '.join(names)}")
