"""Hosts: namespaces of one machine, joined by a bridge."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NEEDED = ("unshare", "nsenter", "ip", "tc", "ps", "ssh", "ssh-keygen", "sshd", "pdsh", "munged", "slurmctld", "slurmd",
          "sbatch")  # fmt: skip
SYSTEM_PATHS = "/usr/local/sbin:/usr/sbin:/sbin"
NETWORK = "10.77.0"
_PR_SET_PDEATHSIG = 1

# The first process of a host: names it, gives it its own files, then waits and collects orphans.
_INIT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
ip link set lo up
touch "$2/$1.up"
set +e
while :; do sleep 1000 & wait $!; done
"""


def why_not() -> str | None:
    """Why there can be no lab here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:{SYSTEM_PATHS}"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Host:
    """A host of a lab.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        pid: its first process, as the machine numbers it.
    """

    def __init__(self, name: str, address: str, folder: Path):
        (folder / f"{name}.up").unlink(missing_ok=True)
        self.name, self.address, self._folder = name, address, folder
        command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*command, "bash", "-c", _INIT, "init", name, str(folder)],
            env=environment(),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def wait_until_up(self) -> None:
        """Return when it has its name, its files and its loopback."""
        wait_for(lambda: (self._folder / f"{self.name}.up").exists() or self._holder.poll() is not None, 10)
        if self._holder.poll() is not None:
            raise RuntimeError(f"host {self.name} did not start")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0])

    def command(self, command: list[str]) -> list[str]:
        """What runs `command` on this host."""
        inside = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *inside, f"--wdns={os.getcwd()}", "--", *command]

    def start(self, command: list[str], env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """Start a command on this host."""
        return subprocess.Popen(self.command(command), env=environment(env), **options)

    def run(self, command: list[str], env: dict[str, str] | None = None, timeout: float = 60, check: bool = True):
        """Run a command on this host to its end; its output is text."""
        done = subprocess.run(
            self.command(command), env=environment(env), capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {command} → {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def processes(self) -> dict[int, str]:
        """Command lines of everything that runs on this host, but for what makes it a host."""
        listed = self.run(["ps", "-ww", "-eo", "pid=,stat=,args="]).stdout.splitlines()
        rows = [line.split(None, 2) for line in listed]
        idle = ("sleep 1000", "ps -ww", "sshd:")
        rows = [(int(pid), args) for pid, stat, args in rows if stat[0] != "Z" and not args.startswith(idle)]
        return {pid: args for pid, args in rows if pid != 1}

    def traffic(self) -> dict[str, int]:
        """Bytes that its network card has `received` and `sent` since it came up."""
        line = next(line for line in self.run(["cat", "/proc/net/dev"]).stdout.splitlines() if "eth0:" in line)
        numbers = line.split(":")[1].split()
        return {"received": int(numbers[0]), "sent": int(numbers[8])}

    def is_up(self) -> bool:
        """Whether it has not crashed."""
        return self._holder.poll() is None

    def crash(self) -> None:
        """End everything on it at once."""
        self._holder.kill()
        self._holder.wait()


class Lab:
    """Hosts `head`, `n1`, `n2`, …, all on one bridge.

    Args:
        folder: for their files; empty.
        nodes: hosts besides `head`.
    """

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder = folder
        names = ["head", *(f"n{i + 1}" for i in range(nodes))]
        self.addresses = {name: f"{NETWORK}.{i + 1}" for i, name in enumerate(names)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self.hosts: dict[str, Host] = {}
        try:
            for name in names:
                self.hosts[name] = Host(name, self.addresses[name], folder)
            for host in self.hosts.values():
                host.wait_until_up()
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Host:
        """Where jobs are submitted."""
        return self.hosts["head"]

    @property
    def nodes(self) -> list[Host]:
        """Where they run."""
        return [host for name, host in self.hosts.items() if name != "head"]

    def _join(self) -> None:
        lines = ["link add lab type bridge", f"addr add {self.head.address}/24 dev lab", "link set lab up"]
        for host in self.nodes:
            lines += self._cable(host)
        self._ip(lines)
        for host in self.nodes:
            self._configure(host)

    def _cable(self, host: Host) -> list[str]:
        link = _link(host)
        return [
            f"link add {link} type veth peer name eth0 address {_hardware_address(host)} netns {host.pid}",
            f"link set {link} master lab",
            f"link set {link} up",
        ]

    def _ip(self, lines: list[str]) -> None:
        # the head's network but the machine's process ids, by which networks are named
        command = ["nsenter", "--target", str(self.head.pid), "--net", "ip", "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, env=environment())

    def restart(self, name: str) -> Host:
        """Bring a host back that crashed: the same name and address, nothing running on it."""
        host = Host(name, self.addresses[name], self.folder)
        self.hosts[name] = host
        host.wait_until_up()
        gone = ["nsenter", "--target", str(self.head.pid), "--net", "ip", "link", "del", _link(host)]
        subprocess.run(gone, capture_output=True, env=environment())  # the kernel may have taken the old one away
        self._ip(self._cable(host))
        self._configure(host)
        return host

    def cut(self, host: Host) -> None:
        """Pull the cable of a host out."""
        self._ip([f"link set {_link(host)} down"])

    def plug(self, host: Host) -> None:
        """Put the cable of a host back in."""
        self._ip([f"link set {_link(host)} up"])

    def shape(self, host: Host, mbit: float) -> None:
        """Let so many 10⁶ bits a second through the cable of a host, each way."""
        rate = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "400ms"]
        self.head.run(["tc", "qdisc", "replace", "dev", _link(host), *rate])
        host.run(["tc", "qdisc", "replace", "dev", "eth0", *rate])

    def unshape(self, host: Host) -> None:
        """Let everything through again."""
        self.head.run(["tc", "qdisc", "del", "dev", _link(host), "root"], check=False)
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False)

    def _configure(self, host: Host) -> None:
        host.run(["ip", "addr", "add", f"{host.address}/24", "dev", "eth0"])
        host.run(["ip", "link", "set", "eth0", "up"])

    def close(self) -> None:
        """End all hosts and everything on them."""
        for host in self.hosts.values():
            host.crash()


def _link(host: Host) -> str:
    """The head's end of a host's cable."""
    return f"to-{host.name}"


def _hardware_address(host: Host) -> str:
    """A host's network card, the same one after a crash: the others remember it."""
    return f"02:00:00:00:00:{int(host.address.rpartition('.')[2]):02x}"


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the system's own commands on the path."""
    return {**os.environ, "PATH": f"{os.environ['PATH']}:{SYSTEM_PATHS}", **(more or {})}


def wait_for(condition, seconds: float) -> bool:
    """Whether `condition()` comes true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
