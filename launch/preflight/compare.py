"""Problems of hosts, found from the facts on each: pure functions, one per check, each problem with its fix."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

GIB = 2**30
SHM_PER_RANK = 66 * 2**20
"""Bytes of /dev/shm that DeepSpeed's CPU op takes per rank; NCCL takes less."""
CLOCK_S = 5.0


@dataclass(frozen=True)
class Problem:
    """A failed check or a warning about one host.

    Attributes:
        host: the host.
        check: what was checked: `torch`, `port`, `interface`.
        value: what was found.
        why: what is wrong with it.
        fix: what to do.
        severity: `failure`, or `warning` if a run can start anyway.
    """

    host: str
    check: str
    value: str
    why: str
    fix: str
    severity: str = "failure"

    def __str__(self):
        return f"{self.host}: {self.check}: {self.value} – {self.why}; {self.fix}"

    def to_dict(self) -> dict:
        """Fields as a dict, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """What a run requires of its hosts.

    Attributes:
        slots: number of ranks by host; the first host holds rank 0 and the rendezvous.
        port: rendezvous port; None for any free one.
        folder: the current folder, for messages.
        python: path of Python, for messages.
        min_shm: required bytes in /dev/shm; None for what DeepSpeed takes.
        min_disk: required bytes for the run's folder.
        files: the run's input files.
        run_dir: the run's folder; None if not known.
    """

    slots: dict[str, int]
    port: int | None
    folder: str
    python: str
    min_shm: int | None
    min_disk: int
    files: tuple[str, ...] = ()
    run_dir: str | None = None

    @property
    def first(self) -> str:
        """The host of rank 0 and of the rendezvous."""
        return next(iter(self.slots))


def compare(facts: dict[str, dict], wanted: Wanted) -> list[Problem]:
    """All problems of the hosts that answered.

    Args:
        facts: the answers of `elas.launch.preflight.probe`, by host.
        wanted: what the run requires.
    """
    alike = [
        problem
        for key, what, pick, fix, severity in _ALIKE
        for problem in _unlike(facts, key, what, pick, fix, severity)
    ]
    each = [problem for check in _EACH for host in facts for problem in check(host, facts[host], wanted)]
    return alike + each + _twice(facts) + _paths(facts, wanted) + _run_dirs(facts, wanted) + _inputs(facts, wanted)


def _twice(facts: dict[str, dict]) -> list[Problem]:
    """One machine under two names: two groups of ranks would share its GPUs from number 0 on."""
    found, owners = [], {}
    for host, of in facts.items():
        address = of.get("address")  # as the other hosts reach it; None if they do not
        if address is None:
            continue
        other = owners.setdefault(address, host)
        if other != host:
            why = f"is the same machine as {other}"
            found.append(Problem(host, "host", address, why, f"give {other} one line, with the slots of both"))
    return found


_SAME = "install the same version on all hosts: pip install -c constraints.txt …"
_ALIKE: list[tuple[str, str, Callable[[dict], object], str, str]] = [
    ("python", "Python", lambda f: f["python"], "install the same Python on all hosts", "failure"),
    *(
        (name, name, lambda f, name=name: f["versions"][name], _SAME, "failure")
        for name in ("torch", "deepspeed", "megatron-core", "elas")
    ),
    ("source", "elas's source", lambda f: f["source"], "update both checkouts to the same commit", "failure"),
    ("gpus", "GPUs", lambda f: ", ".join(sorted(set(f["gpus"]))) or "none", "use hosts with the same GPUs", "failure"),
    ("driver", "the GPU driver", lambda f: f["driver"], "install the same driver on all hosts", "failure"),
    ("mtu", "the interface's MTU", lambda f: _mtu(f), "set the same MTU: ip link set dev … mtu …", "warning"),
]  # fmt: skip


def _mtu(facts: dict) -> int | None:
    return next((i["mtu"] for i in facts["interfaces"] if i["name"] == facts["interface"]), None)


def _unlike(facts: dict[str, dict], key: str, what: str, pick: Callable, fix: str, severity: str) -> Iterable[Problem]:
    """Hosts where a fact differs from the first host's; missing facts (None) are left to other checks."""
    first, *others = facts
    for host in others:
        value, right = pick(facts[host]), pick(facts[first])
        if value != right and value is not None and right is not None:
            differing = facts[host].get("differing") if key == "source" else None
            more = f" in {', '.join(differing[:3])}{' …' if differing[3:] else ''}" if differing else ""
            yield Problem(host, key, str(value), f"{what} differs from {first}'s ({right}){more}", fix, severity)


def _packages(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    for name, version in facts["versions"].items():
        if version is None:
            yield Problem(host, name, "none", "is not installed", f"{wanted.python} -m pip install {name}")


def _port(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    if facts["port_error"] and host == wanted.first:
        why = f"the rendezvous port is in use by {facts['port_error']}"
        yield Problem(host, "port", str(wanted.port), why, "end that process, or give another port with --master-port")


def _hostname(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    addresses = facts["hostname_addresses"]
    if len(wanted.slots) == 1 or any(not a.startswith("127.") and a != "::1" for a in addresses):
        return
    value = addresses[0] if addresses else "unknown"
    interface = facts["interface"] or "the right interface"
    why = "its own name resolves to loopback there (/etc/hosts)" if addresses else "it cannot resolve its own name"
    fix = f"no action needed: runs will use {interface}; other programs may require that line to be removed"
    yield Problem(host, "hostname", value, why, fix, "warning")


def _interface(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    if len(wanted.slots) > 1 and not facts["interfaces"]:
        why = "no network interface is up with an IPv4 address"
        yield Problem(host, "interface", "none", why, "run ip -br address there")
    unreached = [peer for peer, addresses in facts["reached"].items() if not addresses]
    if unreached:
        more = f" and {len(unreached) - 3} more" if unreached[3:] else ""
        why = "no answer on a free TCP port of any address"
        fix = "open all ports above 1023 between the hosts (firewalls), and check ip route on both"
        yield Problem(host, "network", f"{host} → {', '.join(unreached[:3])}{more}", why, fix)


def _room(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    needed = SHM_PER_RANK * wanted.slots[host] if wanted.min_shm is None else wanted.min_shm
    if facts["shm_free"] < needed:
        why = f"/dev/shm has less free than the {needed / GIB:.2f} GiB needed"
        fix = "mount -o remount,size=… /dev/shm there; start a container with --shm-size; or give --min-shm-gb"
        yield Problem(host, "shared memory", f"{facts['shm_free'] / GIB:.2f} GiB", why, fix)
    folder = facts["run_dir"]
    if folder and folder["free"] < wanted.min_disk:
        why = f"{folder['folder']} has less free than the {wanted.min_disk / GIB:.1f} GiB required for checkpoints"
        fix = "free some space, give another train.run_dir, or lower --min-disk-gb"
        yield Problem(host, "disk", f"{folder['free'] / GIB:.2f} GiB", why, fix)


def _slots(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    slots, usual = wanted.slots[host], wanted.slots[wanted.first]
    if facts["gpu_error"]:
        yield Problem(host, "nvidia-smi", "fails", facts["gpu_error"], "fix the driver there, or leave the host out")
    if facts["gpus"] and slots > len(facts["gpus"]):
        why = f"fewer GPUs than its {slots} ranks"
        yield Problem(host, "slots", f"{len(facts['gpus'])} GPUs", why, f"give it slots={len(facts['gpus'])}")
    if slots != usual:
        why = f"runs {slots} ranks, {wanted.first} runs {usual}: the busiest host determines the speed"
        yield Problem(host, "slots", str(slots), why, "give all hosts the same slots", "warning")
    if not facts["gpus"] and slots > facts["cpus"]:
        why = f"more ranks than its {facts['cpus']} CPUs"
        yield Problem(host, "slots", str(slots), why, "give it fewer slots", "warning")


def _build(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    for path in facts["stale_locks"]:
        why = "left by a killed build; every later build would have waited on it forever"
        yield Problem(host, "build lock", path, why, "no action needed: it has been removed", "warning")
    if not facts["compiler"] and not facts["gpus"]:
        why = "no C++ compiler for the CPU kernel of the sparse FFN: slower plain PyTorch is used instead"
        yield Problem(host, "compiler", "none", why, "install g++ there, or set CXX", "warning")


def _clock(host: str, facts: dict, wanted: Wanted) -> Iterable[Problem]:
    offset = facts["clock_offset"]
    if abs(offset) > CLOCK_S:
        why = "its clock differs from this machine's, and so do the times of files and logs"
        yield Problem(host, "clock", f"{offset:+.1f} s", why, "start a time service there (chrony)", "warning")


_EACH = [_packages, _port, _hostname, _interface, _room, _slots, _build, _clock]


def _paths(facts: dict[str, dict], wanted: Wanted) -> list[Problem]:
    """elas must be at the same path everywhere: the deepspeed launcher and torchrun start a script by its path."""
    first, *others = facts
    right = facts[first]["package"]
    fix = "install elas at the same path on all hosts, or on a shared folder"
    return [
        Problem(host, "elas", facts[host]["package"], f"is at another path than on {first} ({right})", fix)
        for host in others
        if facts[host]["package"] != right
    ]


def _run_dirs(facts: dict[str, dict], wanted: Wanted) -> list[Problem]:
    """The run's folder must be writable, and the same folder on all hosts."""
    found = []
    for host, of in facts.items():
        folder = of["run_dir"]
        if folder and folder["error"]:
            fix = "give a folder that is writable on every host"
            found.append(Problem(host, "run_dir", folder["folder"], f"cannot be written ({folder['error']})", fix))
    if wanted.run_dir is None or wanted.first not in facts or facts[wanted.first]["run_dir"]["error"]:
        return found
    for host, of in facts.items():
        if not of["sees_file"]:
            why = f"is not the same folder as on {wanted.first}: each host would hold only part of a checkpoint"
            fix = "give a train.run_dir on a file system that all hosts share, mounted at the same path"
            found.append(Problem(host, "run_dir", wanted.run_dir, why, fix))
    return found


def _inputs(facts: dict[str, dict], wanted: Wanted) -> list[Problem]:
    """The run's input files must exist on all hosts, with the same sizes."""
    found = []
    sizes = {path: next((f["files"][path] for f in facts.values() if f["files"][path] is not None), None)
             for path in wanted.files}  # fmt: skip
    for host, of in facts.items():
        for path, size in of["files"].items():
            if size is None:
                fix = "copy it there, or keep it on a file system that all hosts share"
                found.append(Problem(host, "data", path, "no such file", fix))
            elif size != sizes[path]:
                why = f"has {size:,} bytes, but {sizes[path]:,} on another host"
                found.append(Problem(host, "data", path, why, "copy the same file to all hosts"))
    return found
