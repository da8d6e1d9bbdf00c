"""A file by which a host's guard lets the ranks of a run know which of them have failed.

Launchers end the other ranks with SIGTERM, the signal that also asks a run to save and stop: only this file tells a
rank which of the two it is. And a rank that knows ends at once, where missing heartbeats would take a while to notice.
Standard library only: the guard starts before anything else is imported.
"""

import contextlib
import os
from pathlib import Path

VARIABLE = "ELAS_GUARD_FAILED"
"""Names the file; set by `elas.launch.guard.guard` for what it runs, unset without a guard."""


def report(path: Path, what: str) -> None:
    """Add a line: which rank failed, and how. A full disk is no error: the other ranks find out later."""
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(f"{what}\n")


class FailedRanks:
    """What the guard reports from now on; what failed before a launcher began again (`--restarts`) is not seen."""

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
