"""A file in which a host's guard reports failed ranks to the other ranks.

Launchers end the other ranks with SIGTERM, the signal that also asks a run to save and stop; only this file
distinguishes the two. It also lets ranks end at once, instead of waiting for missing heartbeats. Standard library only,
since the guard must start fast.
"""

import contextlib
import os
from pathlib import Path

VARIABLE = "ELAS_GUARD_FAILED"
"""Environment variable with the file's path; set by `elas.launch.guard.guard`, unset without a guard."""


def report(path: Path, what: str) -> None:
    """Append a line: which rank failed, and how. Errors such as a full disk are ignored; heartbeats will be missing."""
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(f"{what}\n")


class FailedRanks:
    """Failures reported after this was created; those before a launcher restarted the ranks are ignored."""

    def __init__(self):
        self._path = os.environ.get(VARIABLE)
        self._before = len(self._lines())

    def first(self) -> str:
        """The first rank of this host that failed: `rank 1 (process 4711) was killed by SIGKILL`; empty for none."""
        return next(iter(self._lines()[self._before :]), "")

    def _lines(self) -> list[str]:
        if self._path is None:
            return []
        try:
            return Path(self._path).read_text().splitlines()
        except OSError:
            return []
