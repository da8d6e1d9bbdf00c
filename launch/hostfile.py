"""The hosts of a run and how many ranks each takes, in the deepspeed launcher's form: `n1 slots=8`, a line each."""

import re
from pathlib import Path

from elas.errors import UserError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile.

    Args:
        path: lines `HOST slots=N`; what follows a `#` is a comment.

    Returns:
        Ranks by host, in the order of the file, which is the order of the ranks.

    Raises:
        UserError: unreadable, a line of another form, a host given twice, or none at all.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', 'no text')})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or int(match[2]) < 1 or match[1].startswith("-"):
            raise UserError(f"--hostfile {path}: line {number}, {line.strip()!r}; write HOST slots=N, N from 1 up")
        if "@" in match[1]:
            raise UserError(
                f"--hostfile {path}: line {number}, {match[1]!r}; give the host alone, the user in ~/.ssh/config"
            )
        if match[1] in hosts:
            raise UserError(f"--hostfile {path}: line {number}, {match[1]} is given twice; give it one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write a line HOST slots=N for each")
    return hosts


def ranks_by_host(hosts: dict[str, int]) -> dict[str, range]:
    """Which ranks run where."""
    found, first = {}, 0
    for host, slots in hosts.items():
        found[host] = range(first, first + slots)
        first += slots
    return found


def ranks_in_words(ranks: range) -> str:
    """`rank 3`, or `ranks 4-7`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
