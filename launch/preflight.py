"""Whether hosts are fit for a run: every host is asked at once, and its answers compared."""

import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from elas.launch.channels import Channel, Way, ask, open_channels
from elas.launch.compare import GIB, Problem, Wanted, compare, unanswered

FACTS_S, OTHERS_S = 30.0, 20.0


@dataclass
class Report:
    """What was found.

    Attributes:
        slots: ranks by host, as asked.
        hosts: facts by host, of those that answered.
        problems: what is wrong, and what is worth knowing.
        master_address: the first host's address as every host reaches it; None when there is none.
        master_port: the port where ranks meet, free on the first host (if no problem says otherwise).
        bandwidth: what `elas.launch.bandwidth` measured, or None.
    """

    slots: dict[str, int]
    hosts: dict[str, dict] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    master_address: str | None = None
    master_port: int | None = None
    bandwidth: dict | None = None

    @property
    def failures(self) -> list[Problem]:
        """What keeps a run from starting."""
        return [problem for problem in self.problems if problem.severity == "failure"]

    @property
    def warnings(self) -> list[Problem]:
        """What is worth knowing."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether a run can start."""
        return not self.failures

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "ok": self.ok,
            "hosts": [{"host": host, "slots": slots, **self.hosts.get(host, {})} for host, slots in self.slots.items()],
            "problems": [problem.to_dict() for problem in self.problems],
            "master_address": self.master_address,
            "master_port": self.master_port,
            "bandwidth": self.bandwidth,
        }


def preflight(
    hosts: dict[str, int],
    *,
    way: Way | None = None,
    master_port: int | None = None,
    run_dir: Path | str | None = None,
    files: tuple[str, ...] = (),
    min_shm_gb: float | None = None,
    min_disk_gb: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Ask every host what a run needs to know, and compare.

    Args:
        hosts: ranks by host; the first is where ranks meet.
        way: how to reach them; None for ssh, with the Python that runs this.
        master_port: where ranks will meet; None for a free one.
        run_dir: the run's folder, which need not exist; None when not known.
        files: the run's input, to be found on every host.
        min_shm_gb: GiB of /dev/shm a host needs; None for what DeepSpeed takes for its ranks.
        min_disk_gb: GiB that must be free for the run's folder.
        progress: called with what happens now.
    """
    way = way or Way("ssh")
    wanted = Wanted(
        slots=hosts,
        port=master_port,
        folder=os.getcwd(),
        python=way.python,
        min_shm=None if min_shm_gb is None else int(min_shm_gb * GIB),
        min_disk=int(min_disk_gb * GIB),
        files=tuple(map(str, files)),
        run_dir=None if run_dir is None else str(run_dir),
    )
    report = Report(dict(hosts))
    words = {host: ["-m", "elas.launch.probe", *([] if way.kind == "srun" else [host])] for host in hosts}
    progress(f"asking {len(hosts)} host{'s' * (len(hosts) > 1)} …")
    with open_channels(way, list(hosts), words) as channels:
        _ask_all(report, channels, wanted, over_ssh=way.kind == "ssh")
    report.problems += compare(report.hosts, wanted) if report.hosts else []
    return report


def _ask_all(report: Report, channels: list[Channel], wanted: Wanted, *, over_ssh: bool) -> None:
    """Fill in the facts, where ranks meet, and who did not answer."""
    about = {"token": secrets.token_hex(6), "first": wanted.first, "run_dir": wanted.run_dir}
    question = {**about, "port": wanted.port, "files": wanted.files, "names": [wanted.first]}
    found = ask(channels, {"ask": "facts", **question}, FACTS_S)
    for channel in channels:
        for host in channel.hosts:
            if host in found:
                report.hosts[host] = found[host]
            else:
                report.problems.append(unanswered(host, channel.why(host), wanted, over_ssh=over_ssh))
    if not found:
        return
    start = time.time()
    for host, answer in ask(channels, {"ask": "clock"}, OTHERS_S).items():
        report.hosts[host]["clock_offset"] = answer["clock"] - (start + time.time()) / 2
    peers = {host: {"addresses": [a for i in of["interfaces"] for a in i["addresses"]], "port": of["port"]}
             for host, of in report.hosts.items()}  # fmt: skip
    for host, answer in ask(channels, {"ask": "others", **about, "peers": peers}, OTHERS_S).items():
        report.hosts[host] |= answer
    if len({of["source"] for of in report.hosts.values()}) > 1:
        _name_differing_files(report.hosts, ask(channels, {"ask": "sources"}, OTHERS_S))
    _meet(report, wanted)


def _name_differing_files(hosts: dict[str, dict], answers: dict[str, dict]) -> None:
    right = answers.get(next(iter(hosts)), {}).get("sources", {})
    for host, answer in answers.items():
        theirs = answer["sources"]
        hosts[host]["differing"] = sorted(n for n in right.keys() | theirs.keys() if right.get(n) != theirs.get(n))


def _meet(report: Report, wanted: Wanted) -> None:
    """Where ranks meet, and the interface of every host on the way there."""
    first = wanted.first
    if first not in report.hosts:
        return
    report.master_port = wanted.port or report.hosts[first]["port"]
    report.master_address = address = choose_master_address(report.hosts, first)
    for host, of in report.hosts.items():
        if host == first:
            owners = {a: i["name"] for i in of["interfaces"] for a in i["addresses"]}
            of["address"], of["interface"] = address, owners.get(address)
        else:
            of["address"], of["interface"] = of.get("reached", {}).get(first, {}).get(address, (None, None))


def choose_master_address(facts: dict[str, dict], first: str) -> str | None:
    """The address of the first host as every other reaches it; the one its name stands for, if that is one of them.

    Args:
        facts: by host, what `elas.launch.probe` says there.
        first: the host where ranks meet.

    Returns:
        An IPv4 address, never loopback when there are other hosts; None when they share no address of it.
    """
    own = [address for interface in facts[first]["interfaces"] for address in interface["addresses"]]
    others = [of for host, of in facts.items() if host != first]
    if not others:
        return own[0] if own else "127.0.0.1"
    common = [a for a in own if all(a in of.get("reached", {}).get(first, {}) for of in others)]
    named = [address for of in others for address in of["resolves"].get(first, [])]
    return next((a for a in named if a in common), common[0] if common else None)


def lines(problems: list[Problem], *, file=sys.stderr) -> None:
    """Print problems, a line each: failures first."""
    for problem in sorted(problems, key=lambda p: p.severity):
        word = "error" if problem.severity == "failure" else "note"
        print(f"{word}: {problem}", file=file)
