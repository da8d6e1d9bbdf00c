"""`elas launch ssh` in a lab: started as a process of the head, its ranks found on their hosts."""

import subprocess
import sys
import time
from pathlib import Path

from lab.hosts import Host, wait_for
from support.corpora import SMALL, arguments
from support.training_processes import rows

from elas.launch import pretrain

LAUNCH = [sys.executable, "-m", "elas.cli", "launch"]
ENDLESS = {**SMALL, "data.split": "90,10,0", "train.steps": 1000000, "checkpoint.every_steps": 0}


class Launched:
    """A launch under way.

    Args:
        lab: its hosts.
        folder: for the hostfile and the run.
        settings: of the run, by dotted key.
        slots: ranks by host.
        options: more of `elas launch ssh`.
    """

    def __init__(self, lab, folder: Path, settings: dict, *options: str, slots: dict[str, int] | None = None):
        self.lab, self.run_dir = lab, folder / "run"
        slots = slots or {host.name: 1 for host in lab.nodes}
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{name} slots={n}\n" for name, n in slots.items()))
        given = arguments({"train.run_dir": self.run_dir, **settings})
        self.process = lab.head.start(
            [*LAUNCH, "ssh", "--hostfile", str(hostfile), *options, *given],
            env={"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        """Return when the run has logged a step."""
        reached = lambda: any(row["step"] >= step for row in rows(self.run_dir))  # noqa: E731
        if not wait_for(lambda: reached() or self.process.poll() is not None, seconds) or not reached():
            raise AssertionError(self.kill())

    def finish(self, seconds: float = 120) -> str:
        """Wait for the launcher's end; everything that was printed, also by what outlives it."""
        try:
            return self.process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> str:
        """Kill the launcher, whose guards then end the rest; everything that was printed.

        `process` is not the launcher: it entered the head's namespaces, and killing it would leave the launch running.
        """
        for pid, words in self.lab.head.processes().items():
            if "elas.cli launch ssh" in words:
                self.lab.head.run(["kill", "-9", str(pid)], check=False)
        return self.process.communicate(timeout=60)[0]

    def launcher(self) -> int:
        """Process id of `elas launch` on the head."""
        return next(pid for pid, words in self.lab.head.processes().items() if "elas.cli launch ssh" in words)

    def left(self) -> dict[str, dict[int, str]]:
        """Processes on the hosts that are still there."""
        found = {name: host.processes() for name, host in self.lab.hosts.items() if host.is_up()}
        return {name: processes for name, processes in found.items() if processes}

    def wait_until_nothing_is_left(self, seconds: float) -> float:
        """Seconds until no host runs anything."""
        start = time.monotonic()
        assert wait_for(lambda: not self.left(), seconds), self.left()
        return time.monotonic() - start


def ranks_on(host: Host) -> list[int]:
    """Process ids of the ranks on a host, as it numbers them."""
    start = f"{sys.executable} -u {pretrain.__file__}"
    return [pid for pid, words in host.processes().items() if words.startswith(start)]


def send(host: Host, name: str, pids: list[int]) -> None:
    """Send a signal to processes of a host."""
    assert pids
    host.run(["kill", f"-{name}", *map(str, pids)])


def pid_of(host: Host, module: str) -> int:
    """The one process of a host that runs a Python module."""
    starts = tuple(f"{sys.executable} {unbuffered}-m {module} " for unbuffered in ("", "-u "))
    (pid,) = [pid for pid, line in host.processes().items() if line.startswith(starts)]
    return pid
