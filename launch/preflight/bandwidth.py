"""Runs `elas.launch.preflight.collectives` on the hosts of a run, with a time-out."""

import json
import time
from collections.abc import Callable

from elas.launch.hostfile import ranks_by_host, ranks_in_words
from elas.launch.preflight.channels import Channel, Way, open_channels
from elas.launch.preflight.compare import Problem

TIMEOUT_S = 90.0
SIGN_S = 1.0
LAST_WORDS_S = 5.0
"""Seconds that the other hosts have to report their errors after one has failed."""
_FIX = "open all ports between the hosts in their firewalls, and check the interface; --no-collectives skips this test"


def measure(
    hosts: dict[str, int],
    address: str,
    port: int,
    *,
    way: Way,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict | None, Problem | None]:
    """Run collectives over all ranks.

    Args:
        hosts: number of ranks by host.
        address: rendezvous address.
        port: rendezvous port.
        way: how hosts are reached.
        timeout_s: seconds after which all ranks are killed.
        progress: called with a line about the current activity.

    Returns:
        The measurements of rank 0 (see `elas.launch.preflight.collectives`) and None; or None and the problem.
    """
    progress(f"collectives over {sum(hosts.values())} ranks …")
    first = next(iter(hosts))
    where = ["--hosts", json.dumps(hosts), "--master-addr", address, "--master-port", str(port)]
    words = {}
    for host, ranks in ranks_by_host(hosts).items():
        guard = ["-m", "elas.launch.guard", "--leash"]
        # Under srun all hosts get the same words, so each takes its name from SLURM.
        name = ["--host", host] if way.kind != "srun" else []
        label = [*name, "--label", ranks_in_words(ranks)] if way.kind != "srun" else []
        words[host] = [*guard, *label, "--", way.python, "-m", "elas.launch.preflight.collectives", *where, *name]
    with open_channels(way, list(hosts), words) as channels:
        found, over = _watch(channels, time.monotonic() + timeout_s)
        if found is not None and not over:
            return found, None
        for channel in channels:
            channel.send("kill")
        return None, _why(channels, first, None if over else timeout_s)


def _watch(channels: list[Channel], until: float) -> tuple[dict | None, bool]:
    """Send heartbeats to the guards until all ranks are done, one has failed, or the time is over.

    Returns:
        Rank 0's measurements or None, and whether a rank failed.
    """
    found = None
    while time.monotonic() < until:
        for channel in channels:
            channel.send("+")
        answer = channels[0].receive(time.monotonic() + SIGN_S) if found is None else None
        found = found or (answer and answer[1])
        statuses = [channel.status() for channel in channels]
        if any(statuses):
            _wait_for_errors(channels, min(until, time.monotonic() + LAST_WORDS_S))
            return None, True
        if found is not None:
            if statuses == [0] * len(statuses):
                return found, False
            time.sleep(0.05)
        elif answer is None and statuses[0] == 0:
            return None, True
    return None, False


def _wait_for_errors(channels: list[Channel], until: float) -> None:
    while time.monotonic() < until and any(channel.status() is None for channel in channels):
        for channel in channels:
            channel.send("+")
        time.sleep(0.1)


def _why(channels: list[Channel], first: str, timeout_s: float | None) -> Problem:
    """The problem to report for ranks that failed or, with `timeout_s`, did not finish in time."""
    value = "failed" if timeout_s is None else f"not finished in {timeout_s:.0f} s"
    for channel in channels:
        for host in channel.hosts:
            said = channel.why(host)
            words = [line for line in said.error.splitlines() if "error: " in line]
            if words:
                why = words[0].partition("error: ")[2]
                if said.status == 2:  # a user error, whose message ends in its fix
                    why, _, fix = why.rpartition("; ")
                    return Problem(host, "collectives", value, why, fix)
                return Problem(host, "collectives", value, why.removeprefix(f"{host}: "), _FIX)
    return Problem(first, "collectives", value, "no rank reported an error", _FIX)
