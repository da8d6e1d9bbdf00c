"""Hostfiles in the deepspeed launcher's format, one `HOST slots=N` per line: a run's hosts and the ranks on each."""

import re
from pathlib import Path

from elas.errors import UserError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile.

    Args:
        path: lines `HOST slots=N`; a `#` starts a comment.

    Returns:
        Number of ranks by host, in file order; ranks are numbered in this order.

    Raises:
        UserError: the file is unreadable, a line is malformed, a host is repeated, or there is no host.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', 'no text')})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or int(match[2]) < 1 or match[1].startswith("-"):
            raise UserError(f"--hostfile {path}: line {number}, {line.strip()!r}; write HOST slots=N, N at least 1")
        if "@" in match[1]:
            raise UserError(
                f"--hostfile {path}: line {number}, {match[1]!r}; give only the host, and set the user in ~/.ssh/config"
            )
        if match[1] in hosts:
            raise UserError(f"--hostfile {path}: line {number}, {match[1]} is listed twice; give it one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write one line HOST slots=N per host")
    return hosts


def ranks_by_host(hosts: dict[str, int]) -> dict[str, range]:
    """The global ranks on each host."""
    found, first = {}, 0
    for host, slots in hosts.items():
        found[host] = range(first, first + slots)
        first += slots
    return found


def ranks_in_words(ranks: range) -> str:
    """Format as `rank 3` or `ranks 4-7`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
