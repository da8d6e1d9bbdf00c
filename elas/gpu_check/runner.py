"""Runs parts one after the other within the budget of time."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from elas.console import clock
from elas.gpu_check import processes, rows
from elas.gpu_check.parts import NO_CUDA, Part
from elas.gpu_check.rows import NO_TIME, Found, Row
from elas.gpu_check.setting import Setting

Progress = Callable[[str], None]
ON_CPU = 3
"""Times a part's limit, in a dry run: it may share a few cores with others."""
_RESERVE_S = 3.0
"""A part is told to end so long before it is killed."""


def run_parts(
    parts: list[Part], device: str, logs: Path, ends: float, progress: Progress
) -> Iterator[tuple[str, Found]]:
    """Run parts.

    Args:
        parts: in order.
        device: `cuda` or `cpu`.
        logs: folder of logs, `PART.log` and others.
        ends: end of the budget, in seconds of `time.monotonic`.
        progress: called four times a second with what runs.

    Yields:
        The name of a part and what it found, as soon as it has ended.
    """
    for part in parts:
        if part.needs_gpu and device == "cpu":
            yield part.name, Found([Row(part=part.name, group=part.name, result="not run", reason=NO_CUDA)])
        elif ends - time.monotonic() < part.least_s:
            yield part.name, Found([Row(part=part.name, group=part.name, result="not run", reason=NO_TIME)])
        else:
            yield part.name, run_part(part, device, logs, ends - time.monotonic(), progress)


def run_part(part: Part, device: str, logs: Path, left_s: float, progress: Progress) -> Found:
    """Run a part in a process; if that fails, a row says how, in addition to those that it wrote before."""
    own = part.limit_s * (ON_CPU if device == "cpu" else 1)
    limit = min(own, left_s)
    log = logs / f"{part.name.lower()}.log"
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elas-gpu-check-") as work:
        path = Path(work) / "rows.jsonl"
        setting = Setting(part.name, device, path, logs, Path(work), max(1.0, limit - _RESERVE_S), int(limit < own))

        def tick() -> None:
            known = len(rows.read(path).rows)
            count = f", {known} done" if known else ""
            newest = max(logs.glob("*.log"), key=lambda one: one.stat().st_mtime, default=log)
            now = processes.last_line(newest)
            does = "" if now.startswith("$ ") else f": {now}"
            progress(f"{part.name} ({clock(time.monotonic() - start)}{count}){does}")

        process = processes.start(part.command(setting), log, {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        try:
            in_time = processes.wait(process, limit, tick)
            now = processes.last_line(log)
        finally:
            processes.end(process)
        found = rows.read(path)
    if failure := _failure(part, own, in_time, limit, now, found, process.returncode and processes.ended(process, log)):
        found.rows.append(failure)
    return found


def _failure(
    part: Part, own: float, in_time: bool, limit: float, now: str, found: Found, ended: str | int
) -> Row | None:
    def row(result: rows.Result, reason: str) -> Row:
        return Row(part=part.name, group=part.name, case="(whole part)", result=result, reason=reason)

    if not in_time:
        if limit < own:
            return row("not run", f"{NO_TIME} for the rest of this part")
        return row("wrong", f"not complete after {limit:.0f} s, killed; {part.name.lower()}.log ends: {now}")
    if ended:
        return row("wrong", str(ended))
    return None if found.rows else row("wrong", "it ended without a result")
