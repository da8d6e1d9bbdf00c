"""The report: a table for people, report.txt and report.json."""

import math
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elas.console import clock, table
from elas.files import write_json
from elas.gpu_check.rows import Found, Row

WIDTH = 72
"""Columns of the last column of the table."""
RESULTS = ("right", "wrong", "not run")
PEERS = ("lowrank_relu2", "lowrank_relu2_compiled", "full_swiglu", "full_swiglu_compiled", "full_swiglu_liger",
         "hf_llama", "hf_llama_compiled")  # fmt: skip
"""Variants whose ratios the table shows; report.json has all."""

FORMS = {
    "ms": "{:,.2f} ms",
    "tokens_per_s": "{:,.0f} tokens/s",
    "tflops": "{:,.3g} TFLOP/s",
    "peak_share": "{:.0%} of peak",
    "bandwidth_share": "{:.0%} of bandwidth",
    "bus_gb_per_s": "{:,.0f} GB/s on the bus",
}
"""How the figures of a row are shown."""


@dataclass
class Report:
    """What was found so far.

    Args:
        dry_run: whether the parts run on the CPU.
        minutes: the budget.
    """

    dry_run: bool
    minutes: float
    found: Found = field(default_factory=Found)
    _start: float = field(default_factory=time.monotonic)

    def add(self, found: Found) -> None:
        """Add what a part found."""
        self.found.rows += found.rows
        self.found.facts |= found.facts

    @property
    def counts(self) -> dict[str, int]:
        """Rows by result."""
        return count(self.found.rows)

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON; keys as in docs/gpu.md."""
        facts = {"device": None, "gpu": None, "nvidia_smi": None, "versions": None, **self.found.facts}
        rows = [_finite(row.facts()) for row in self.found.rows]
        return {**facts, "dry_run": self.dry_run, "minutes": self.minutes,
                "seconds": round(time.monotonic() - self._start, 1), "counts": self.counts, "rows": rows}  # fmt: skip

    def text(self) -> str:
        """The table, and what it adds up to."""
        facts, counts = self.found.facts, self.counts
        head = f"elas gpu-check, {facts.get('device') or 'unknown device'}"
        head += ", a dry run on the CPU" if self.dry_run else ""
        cells = [line for row in lines(self.found.rows) for line in _wrapped(row)]
        total = ", ".join(f"{counts[result]} {result}" for result in RESULTS)
        return "\n".join(
            [head, "", table(["part", "what", "result", "figures, reason"], cells, left=4), "",
             f"{total}; {clock(time.monotonic() - self._start)}"]
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write report.txt and report.json."""
        write_json(folder / "report.json", self.facts())
        (folder / "report.txt").write_text(self.text() + "\n")


def count(rows: list[Row]) -> dict[str, int]:
    """Rows by result."""
    return {result: sum(row.result == result for row in rows) for result in RESULTS}


def _wrapped(row: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Lines of one row: its last cell is wrapped, since a reason may be long."""
    *cells, last = row
    for text in textwrap.wrap(last, WIDTH, break_on_hyphens=False) or [""]:
        yield (*cells, text)
        cells = [""] * len(cells)


def lines(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """Cells of the table; rows of one group share a line if they are right, or have the same reason."""
    together: dict[tuple, list[Row]] = {}
    for number, row in enumerate(rows):
        alike = ("", None) if row.result == "right" and row.case else (row.reason, row.error)
        single = None if row.case else number
        together.setdefault((row.part, row.group, row.result, alike, single), []).append(row)
    return [_line(alike) for alike in together.values()]


def _line(rows: list[Row]) -> tuple[str, str, str, str]:
    first = rows[0]
    cases = [row.case for row in rows if row.case]
    if len(cases) > 1 and all(case.startswith("rank ") for case in cases):
        cases = ["ranks", *(case.removeprefix("rank ") for case in cases)]
    what = " ".join([first.group, *cases])
    errors = [row.error for row in rows if row.error is not None]
    reason = first.reason
    if errors:
        compared = f"{max(errors):.1e}, bound {first.bound:.0e}" if first.bound else f"{max(errors):.1e}"
        reason = f"{reason}: error {compared}" if reason else f"error {compared}"
    result = first.result.upper() if first.result == "wrong" else first.result
    return first.part, what, result, "; ".join(filter(None, (speed_in_words(first.speed), reason)))


def speed_in_words(speed: dict[str, Any] | None) -> str:
    """Figures of a row in a few words; empty without them."""
    if not speed:
        return ""
    words = [form.format(speed[key]) for key, form in FORMS.items() if key in speed]
    ratios = speed.get("times_as_fast_as", {})
    words += [f"{ratios[peer]:.2f}× {peer}" for peer in PEERS if peer in ratios]
    return ", ".join(words)


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    error = facts["error"]
    return {**facts, "error": error if error is None or math.isfinite(error) else None}
