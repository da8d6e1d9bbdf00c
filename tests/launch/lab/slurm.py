"""SLURM on the hosts of a lab: munge, slurmctld on the head, a slurmd on every node."""

import os
import subprocess

from .hosts import Host, Lab, wait_for

_CONFIG = """
ClusterName=lab
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=15
SlurmctldTimeout=10
MinJobAge=300
MessageTimeout=3
TCPTimeout=1
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster of the lab's nodes.

    Args:
        lab: the hosts.
        cpus: CPUs that each node claims to have.
        gpus: GPUs that it claims to have; they are `/dev/null` under other names.
    """

    def __init__(self, lab: Lab, cpus: int = 4, gpus: int = 0):
        self.lab, self.folder = lab, lab.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus} RealMemory=8000 State=UNKNOWN"
            + (f" Gres=gpu:{gpus}" if gpus else "")
            for host in lab.nodes
        )
        self._make_gpus(gpus)
        self.config = self.folder / "slurm.conf"
        self.config.write_text(_CONFIG.format(head=lab.head.address, folder=self.folder, nodes=nodes))
        self._key = self.folder / "munge.key"
        self._key.write_bytes(os.urandom(128))
        self._key.chmod(0o600)
        self.env = {"SLURM_CONF": str(self.config)}
        self._start_munge(lab.head)
        self._start(lab.head, ["slurmctld", "-D", "-c"])
        for host in lab.nodes:
            self.start_node(host)
        if not wait_for(lambda: self.states() == {"idle"}, 20):
            raise RuntimeError(f"SLURM did not start: {self.states()}")

    def start_node(self, host: Host) -> None:
        """Start munge and slurmd on a host, new or restarted."""
        self._start_munge(host)
        self.start_slurmd(host)

    def start_slurmd(self, host: Host) -> None:
        """Start slurmd alone."""
        self._start(host, ["slurmd", "-D", "-N", host.name])

    def states(self) -> set[str]:
        """The states that nodes are in."""
        return set(self.run(["sinfo", "-h", "-N", "-p", "lab", "-o", "%t"], check=False).stdout.split())

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """Run one of SLURM's commands, or anything that calls them, on the head."""
        return self.lab.head.run(command, env={**self.env, **options.pop("env", {})}, **options)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of the first of an array."""
        words = self.run(["scontrol", "show", "job", "-o", number]).stdout.splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_jobs(self, seconds: float) -> None:
        """Return when no job is left in the queue; raises `TimeoutError`."""
        if not wait_for(lambda: not self.run(["squeue", "-h"]).stdout.strip(), seconds):
            raise TimeoutError(self.run(["squeue"]).stdout)

    def _make_gpus(self, gpus: int) -> None:
        lines = []
        for i in range(gpus):
            subprocess.run(["mknod", str(self.folder / f"gpu{i}"), "c", "1", "3"], check=True)
            lines.append(f"Name=gpu File={self.folder}/gpu{i}\n")
        (self.folder / "gres.conf").write_text("".join(lines))

    def _start_munge(self, host: Host) -> None:
        run = ["--socket=/run/munge.socket", f"--key-file={self._key}", "--pid-file=/run/munged.pid"]
        self._start(host, ["munged", "--force", "--foreground", *run, "--seed-file=/run/munged.seed"])

    def _start(self, host: Host, command: list[str]) -> None:
        log = self.folder / f"{command[0]}-{host.name}.out"
        with log.open("wb") as file:
            host.start(command, self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
