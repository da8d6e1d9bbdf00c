"""`Finding`, one fact about the machine, and how findings are shown."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from elas.console import table

NOT_ON_CPUS = "none needed on CPUs"
"""The fix of what only GPUs have, on machines without one."""
AGAIN = "run again with a longer --timeout, or when the machine is less busy"
"""The fix of what was not checked in time."""
LINE = 240
"""Longest message of an error, in characters."""


@dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Attributes:
        what: the thing looked for.
        ok: whether it is present and works.
        found: version or state.
        needed_for: what requires it.
        fix: what to do, in one line; empty if `ok`.
        required: whether ELAS cannot run here without it.
        checked: False if the time was over before it could be checked; it may then be present or not.
    """

    what: str
    ok: bool
    found: str
    needed_for: str
    fix: str = ""
    required: bool = False
    checked: bool = True

    @property
    def mark(self) -> str:
        """`✓` present, `✗` required and missing or broken, `–` optional and missing or broken, `?` not checked."""
        return "?" if not self.checked else "✓" if self.ok else "✗" if self.required else "–"

    def to_dict(self) -> dict:
        """Fields as a dict, for JSON."""
        return asdict(self)


def unchecked(what: str, why: str | None, needed_for: str, required: bool = False) -> Finding:
    """The finding about what was not checked in time; `why` is the error of its `Answer`."""
    return Finding(what, False, why or "not checked", needed_for, AGAIN, required, checked=False)


def one_line(text: object) -> str:
    """Text as one line of at most `LINE` characters."""
    return clipped(" ".join(str(text).split()), LINE)


def clipped(line: str, length: int) -> str:
    """A line cut to `length` characters, the last of them `…` if it is longer."""
    return line if len(line) <= length else f"{line[: length - 1]}…"


def report(findings: Sequence[Finding], width: int | None = None) -> str:
    """The findings as a table, the fixes below it, and a line with the result.

    Args:
        findings: at least one.
        width: columns of the terminal; None: of this one.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    headers = ["", "what", "found", "needed for"]
    others = sum(max(map(len, column)) for column in (
        [headers[1], *(of.what for of in findings)], [headers[3], *(of.needed_for for of in findings)]
    ))  # fmt: skip
    room = max(24, width - 7 - others)  # 7: the mark, and two spaces between columns
    rows = [[of.mark, of.what, clipped(of.found, room), of.needed_for] for of in findings]
    lines = [table(headers, rows, left=4), ""]
    for title, required in (("missing or broken", True), ("optional, not available", False)):
        bad = [of for of in findings if not of.ok and of.checked]
        bad = [of for of in bad if of.required == required and of.fix != NOT_ON_CPUS]
        if bad:
            lines += [f"{title}:", *(f"{of.mark} {of.what}: {of.found}; {of.fix}" for of in bad), ""]
    late = [of for of in findings if not of.checked]
    if late:
        lines += [f"not checked: {', '.join(of.what for of in late)}; {AGAIN}", ""]
    return "\n".join([*lines, _verdict(findings)])


def _verdict(findings: Sequence[Finding]) -> str:
    bad = ", ".join(of.what for of in findings if of.required and of.checked and not of.ok)
    late = any(of.required and not of.checked for of in findings)
    if bad:
        return f"not ready for ELAS: {bad}" + ("; not all was checked" if late else "")
    return "nothing is known to be missing or broken, but not all was checked" if late else "ready for ELAS"
