"""Checks whether hosts are fit for a run: queries all hosts at once and compares their answers."""

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from elas.launch.preflight.channels import Channel, Way, ask, open_channels
from elas.launch.preflight.compare import GIB, Problem, Wanted, compare
from elas.launch.preflight.unanswered import unanswered

FACTS_S, OTHERS_S = 30.0, 20.0
PASSED, FAILED, NOTED = "✓", "✗", "!"


@dataclass
class Report:
    """Result of the survey.

    Attributes:
        slots: requested number of ranks by host.
        hosts: facts by host, for the hosts that answered.
        problems: failures and warnings.
        master_address: the first host's address that all hosts reach; None if there is none.
        master_port: the rendezvous port, free on the first host unless a problem reports otherwise.
        bandwidth: measurements of `elas.launch.preflight.bandwidth`, or None.
    """

    slots: dict[str, int]
    hosts: dict[str, dict] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    master_address: str | None = None
    master_port: int | None = None
    bandwidth: dict | None = None

    @property
    def failures(self) -> list[Problem]:
        """Problems that prevent a run from starting."""
        return [problem for problem in self.problems if problem.severity == "failure"]

    @property
    def warnings(self) -> list[Problem]:
        """Problems with which a run can still start."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether a run can start."""
        return not self.failures

    @property
    def rendezvous(self) -> tuple[str, int]:
        """Address and port on the first host, of a report that is `ok`."""
        assert self.master_address is not None and self.master_port is not None  # else there is a failure
        return self.master_address, self.master_port

    def to_dict(self) -> dict:
        """The report as a dict, for JSON."""
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
    """Query every host and compare the answers.

    Args:
        hosts: number of ranks by host; the rendezvous is on the first.
        way: how to reach them; None for ssh, with the Python that runs this.
        master_port: rendezvous port; None for a free one.
        run_dir: the run's folder, which need not exist; None if not known.
        files: the run's input files, required on every host.
        min_shm_gb: GiB of /dev/shm required per host; None for what DeepSpeed takes for its ranks.
        min_disk_gb: GiB that must be free for the run's folder.
        progress: called with a line about the current activity.
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
    words = {host: ["-m", "elas.launch.preflight.probe", *([] if way.kind == "srun" else [host])] for host in hosts}
    progress(f"asking {len(hosts)} host{'s' * (len(hosts) > 1)} …")
    with open_channels(way, list(hosts), words) as channels:
        _ask_all(report, channels, wanted, way)
    report.problems += compare(report.hosts, wanted) if report.hosts else []
    return report


def _ask_all(report: Report, channels: list[Channel], wanted: Wanted, way: Way) -> None:
    """Fill in the facts, the rendezvous, and the hosts that did not answer."""
    about = {"token": secrets.token_hex(6), "first": wanted.first, "run_dir": wanted.run_dir}
    question = {**about, "port": wanted.port, "files": wanted.files, "names": [wanted.first]}
    _ask(report, channels, wanted, {"ask": "facts", **question}, way)
    start = time.time()
    for of in _ask(report, channels, wanted, {"ask": "clock"}, way).values():
        of["clock_offset"] = of.pop("clock") - (start + time.time()) / 2
    peers = {host: {"addresses": [a for i in of["interfaces"] for a in i["addresses"]], "port": of["port"]}
             for host, of in report.hosts.items()}  # fmt: skip
    _ask(report, channels, wanted, {"ask": "others", **about, "peers": peers}, way)
    if len({of["source"] for of in report.hosts.values()}) > 1:
        _name_differing_files(_ask(report, channels, wanted, {"ask": "sources"}, way))
    if report.hosts:
        _choose_rendezvous(report, wanted)


def _ask(report: Report, channels: list[Channel], wanted: Wanted, question: dict, way: Way) -> dict[str, dict]:
    """Add every host's answer to its facts, and a problem for each host without one; returns the facts by host."""
    asked = [(channel, host) for channel in channels for host in channel.hosts if host in channel.answering]
    found = ask(channels, question, FACTS_S if question["ask"] == "facts" else OTHERS_S)
    for channel, host in asked:
        if host in found:
            report.hosts[host] = report.hosts.get(host, {}) | found[host]
        else:
            report.hosts.pop(host, None)
            report.problems.append(unanswered(host, channel.why(host), wanted, way.kind))
    return report.hosts


def _name_differing_files(hosts: dict[str, dict]) -> None:
    sources = {host: of.pop("sources") for host, of in hosts.items()}
    right = next(iter(sources.values()), {})
    for host, theirs in sources.items():
        hosts[host]["differing"] = sorted(n for n in right.keys() | theirs.keys() if right.get(n) != theirs.get(n))


def _choose_rendezvous(report: Report, wanted: Wanted) -> None:
    """Set the rendezvous address and port, and the interface with which each host reaches it."""
    first = wanted.first
    if first not in report.hosts:
        for of in report.hosts.values():
            of["address"] = of["interface"] = None
        return
    report.master_port = wanted.port or report.hosts[first]["port"]
    report.master_address = address = choose_master_address(report.hosts, first)
    for host, of in report.hosts.items():
        if host == first:
            owners = {a: i["name"] for i in of["interfaces"] for a in i["addresses"]}
            of["address"], of["interface"] = address, owners.get(address)
        else:
            of["address"], of["interface"] = of["reached"].get(first, {}).get(address, (None, None))


def choose_master_address(facts: dict[str, dict], first: str) -> str | None:
    """The address of the first host that the most other hosts reach; among several, one that its name resolves to.

    Args:
        facts: the answers of `elas.launch.preflight.probe`, by host.
        first: the host of the rendezvous.

    Returns:
        An IPv4 address, never loopback if there are other hosts; None if no host reaches any.
    """
    own = [address for interface in facts[first]["interfaces"] for address in interface["addresses"]]
    others = [of for host, of in facts.items() if host != first]
    if not others:
        return own[0] if own else "127.0.0.1"
    reaching = {address: sum(address in of["reached"].get(first, {}) for of in others) for address in own}
    most = max(reaching.values(), default=0)
    best = [address for address, number in reaching.items() if number == most > 0]
    named = [address for of in others for address in of["resolves"].get(first, [])]
    return next((address for address in named if address in best), best[0] if best else None)


def lines(problems: list[Problem]) -> list[str]:
    """Format problems as lines, failures first; hosts with the same problem share a line."""
    shared: dict[tuple, list[Problem]] = {}
    for problem in sorted(problems, key=lambda p: p.severity):
        shared.setdefault((problem.severity, problem.check, problem.value, problem.why, problem.fix), []).append(
            problem
        )
    found = []
    for (severity, *_), same in shared.items():
        hosts = [problem.host for problem in same]
        more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
        mark = FAILED if severity == "failure" else NOTED
        found.append(f"{mark} {replace(same[0], host=', '.join(hosts[:4]) + more)}")
    return found
