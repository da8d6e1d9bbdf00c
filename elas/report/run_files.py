"""Reads the files of a run."""

import contextlib
import json
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elas.console import clock
from elas.errors import UserError
from elas.files import read_jsonl
from elas.report.incidents import Incident, incidents_of
from elas.run_dir import DONE, REQUEUE, check_is_run

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say."""

    folder: Path
    name: str
    """Unique on the page."""
    config: dict[str, dict[str, Any]]
    """By section; empty if config.json is missing."""
    facts: Row
    """run.json: facts about the last start."""
    metrics: list[Row]
    validation: list[Row]
    incidents: list[Incident]
    evaluations: list[tuple[str, Row]]
    """Results of `elas eval` in RUN_DIR/eval, with the names of their files."""
    state: str
    """How it ended or stands, in words."""
    began: float
    """First start, in seconds since 1970."""


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """Read runs; their names are the shortest ends of their paths that differ.

    Raises:
        UserError: a folder does not exist, is no run, or has no metrics; or is given twice.
    """
    real = [folder.resolve() for folder in folders]
    for folder, other in zip(folders, real):
        if real.count(other) > 1:
            raise UserError(f"{folder}: is given twice")
    return [_read(folder, name) for folder, name in zip(folders, _names(real))]


def _names(folders: list[Path]) -> list[str]:
    deepest = max(len(folder.parts) for folder in folders)
    for parts in range(1, deepest + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> RunFiles:
    check_is_run(folder)
    try:
        metrics = read_jsonl(folder / "metrics.jsonl", _pack)
        validation = read_jsonl(folder / "validation.jsonl")
        events = _with_time(read_jsonl(folder / "events.jsonl"))
        history = read_jsonl(folder / "config_history.jsonl")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error
    metrics = [row for row in metrics if _number(row.get("loss")) and _number(row.get("tokens"))]
    if not metrics:
        raise UserError(
            f"{folder}: has no step in metrics.jsonl yet; wait for its first, `elas watch {folder}` shows it"
        )
    incidents = incidents_of(events, history)
    times = [row["time"] for row in [*events, *metrics] if _number(row.get("time"))]
    return RunFiles(
        folder=folder,
        name=name,
        config=_read_json(folder / "config.json"),
        facts=_read_json(folder / "run.json"),
        metrics=metrics,
        validation=[row for row in validation if _number(row.get("loss"))],
        incidents=incidents,
        evaluations=[(path.stem, _read_json(path)) for path in sorted((folder / "eval").glob("*.json"))],
        state=_state(folder, incidents, max(times, default=0.0)),
        began=min(times, default=0.0),
    )


def _pack(row: Row) -> None:
    """Make the values by layer arrays, a third of the memory of lists; those with a null remain lists."""
    if isinstance(layers := row.get("layers"), dict):
        for key, values in layers.items():
            with contextlib.suppress(TypeError):
                layers[key] = array("d", values)


def _state(folder: Path, incidents: list[Incident], last: float) -> str:
    if (folder / DONE).exists():
        return "finished"
    if (folder / REQUEUE).exists():
        why = _read_json(folder / REQUEUE).get("stopped")
        return f"stopped ({why}); the next start continues" if why else "stopped; the next start continues"
    if incidents and incidents[-1].kind == "failed":
        return "failed"
    return f"no end recorded; the last line is {clock(max(0.0, time.time() - last))} old"


def _read_json(path: Path) -> Row:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_time(rows: list[Row]) -> list[Row]:
    return [row for row in rows if _number(row.get("time"))]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0
