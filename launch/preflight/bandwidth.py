"""Starts `elas.launch.preflight.collectives` on the hosts of a run, and ends it whatever happens."""

import json
import time
from collections.abc import Callable

from elas.launch.hostfile import ranks_by_host, ranks_in_words
from elas.launch.preflight.channels import Channel, Way, open_channels
from elas.launch.preflight.compare import Problem

TIMEOUT_S = 90.0
SIGN_S = 1.0
LAST_WORDS_S = 5.0
"""What the other hosts have to say what they saw, when one fails."""
_FIX = (
    "see that the hosts' firewalls let each other in on every port, and the interface; --no-collectives leaves it out"
)


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
        hosts: ranks by host.
        address: where ranks meet.
        port: and the port.
        way: how hosts are reached.
        timeout_s: after which everything is ended.
        progress: called with what happens now.

    Returns:
        What rank 0 measured (see `elas.launch.preflight.collectives`), or None and why not.
    """
    progress(f"collectives over {sum(hosts.values())} ranks …")
    first = next(iter(hosts))
    where = ["--hosts", json.dumps(hosts), "--master-addr", address, "--master-port", str(port)]
    words = {}
    for host, ranks in ranks_by_host(hosts).items():
        guard = ["-m", "elas.launch.guard", "--leash"]
        told = ["--host", host, "--told", ranks_in_words(ranks)] if way.kind != "srun" else []
        name = ["--host", host] if way.kind != "srun" else []
        words[host] = [*guard, *told, "--", way.python, "-m", "elas.launch.preflight.collectives", *where, *name]
    with open_channels(way, list(hosts), words) as channels:
        found, over = _watch(channels, time.monotonic() + timeout_s)
        if found is not None and not over:
            return found, None
        for channel in channels:
            channel.send("kill")
        return None, _why(channels, first, None if over else timeout_s)


def _watch(channels: list[Channel], until: float) -> tuple[dict | None, bool]:
    """Keep the guards alive until all ranks are done, one failed, or the time is over.

    Returns:
        Rank 0's measurements, and whether a rank failed.
    """
    found = None
    while time.monotonic() < until:
        for channel in channels:
            channel.send("+")
        answer = channels[0].receive(time.monotonic() + SIGN_S) if found is None else None
        found = found or (answer and answer[1])
        statuses = [channel.status() for channel in channels]
        if any(statuses):
            _hear_out(channels, min(until, time.monotonic() + LAST_WORDS_S))
            return None, True
        if found is not None:
            if statuses == [0] * len(statuses):
                return found, False
            time.sleep(0.05)
        elif answer is None and statuses[0] == 0:
            return None, True
    return None, False


def _hear_out(channels: list[Channel], until: float) -> None:
    while time.monotonic() < until and any(channel.status() is None for channel in channels):
        for channel in channels:
            channel.send("+")
        time.sleep(0.1)


def _why(channels: list[Channel], first: str, timeout_s: float | None) -> Problem:
    """What a person should know of ranks that did not come to their end."""
    value = "failed" if timeout_s is None else f"not over in {timeout_s:.0f} s"
    for channel in channels:
        for host in channel.hosts:
            said = channel.why(host)
            words = [line for line in said.error.splitlines() if "error: " in line]
            if words:
                why = words[0].partition("error: ")[2]
                if said.status == 2:  # a mistake of the user's, told with its fix
                    why, _, fix = why.rpartition("; ")
                    return Problem(host, "collectives", value, why, fix)
                return Problem(host, "collectives", value, why.removeprefix(f"{host}: "), _FIX)
    return Problem(first, "collectives", value, "no rank said why", _FIX)
