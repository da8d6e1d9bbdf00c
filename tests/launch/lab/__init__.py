"""A few hosts on one machine: namespaces joined by a bridge, real sshd and SLURM in them.

A host has a network, a host name, process ids, shared memory and mounts of its own; files are the machine's. It ends,
with everything that runs on it, when `Lab.close` is called or the process that made it dies.
"""

from .hosts import Host, Lab, why_not
from .slurm import Slurm
from .ssh import Ssh

__all__ = ["Host", "Lab", "Slurm", "Ssh", "why_not"]
