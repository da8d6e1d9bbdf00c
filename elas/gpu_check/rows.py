"""A row of the report, and the file in which a part's process hands its rows over."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["right", "wrong", "not run"]
NO_TIME = "no time left"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check.

    Args:
        part: the part that made it.
        group: what was checked; rows of a group with the same outcome share a line of the table.
        case: which case of the group; empty if it is the only one.
        result: `right`, `wrong` or `not run`.
        reason: why it is wrong or was not run; or what was compared.
        error: the measured error; None without one.
        bound: the largest right one.
        speed: figures by name, see docs/gpu.md; None if nothing was timed.
    """

    part: str
    group: str
    result: Result
    case: str = ""
    reason: str = ""
    error: float | None = None
    bound: float | None = None
    speed: dict[str, Any] | None = None

    @property
    def what(self) -> str:
        """Group and case."""
        return f"{self.group} {self.case}".strip()

    def facts(self) -> dict[str, Any]:
        """The row as in report.json."""
        return {"what": self.what, **asdict(self)}


def compared(part: str, group: str, error: float, bound: float, what: str) -> Row:
    """The row of a comparison: wrong above the bound, or if the error is NaN."""
    result: Result = "right" if error <= bound else "wrong"
    return Row(part=part, group=group, result=result, reason=what, error=error, bound=bound)


@dataclass
class Found:
    """What a part has written so far."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def append(path: Path, **line: Any) -> None:
    """Append a line with `row` or `facts`."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> Found:
    """Rows and facts in a file; a last line that was cut by a kill is skipped."""
    found = Found()
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "row" in line:
            found.rows.append(Row(**line["row"]))
        found.facts |= line.get("facts", {})
    return found
