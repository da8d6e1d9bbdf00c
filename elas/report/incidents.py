"""What happened to a run, in order: starts, kills, changed layouts and settings, skipped steps, rollbacks, the end."""

from dataclasses import dataclass
from typing import Any

KINDS = {
    "start": "start",
    "resume": "resumed",
    "killed": "ended without notice",
    "layout": "layout changed",
    "settings": "settings changed",
    "skipped": "step skipped",
    "rollback": "rollback",
    "stopped": "stopped",
    "failed": "failed",
    "finished": "finished",
}
"""Kinds of incidents and how the page calls them."""
ORDINARY = ("start", "finished")
"""Kinds that happen to every run."""


@dataclass(frozen=True)
class Incident:
    """One thing that happened."""

    kind: str
    step: int
    time: float
    """Seconds since 1970."""
    text: str


def incidents_of(events: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[Incident]:
    """All incidents in order.

    Args:
        events: rows of events.jsonl.
        history: rows of config_history.jsonl.
    """
    found: list[Incident] = []
    before: dict[str, Any] | None = None
    open_start = False
    for event in sorted(events, key=lambda one: one["time"]):
        kind, step, time = event.get("event", ""), event["step"], event["time"]
        if kind == "start":
            if open_start:
                why = "killed, crashed, or its host was lost; noticed at the next start"
                found.append(Incident("killed", step, time, why))
            found += _start(event, before)
            before, open_start = event, True
        elif kind == "skipped":
            what = f"loss {_number(event.get('loss'))}, gradient norm {_number(event.get('grad_norm'))}"
            found.append(Incident(kind, step, time, f"{what}; {event.get('consecutive', 1)} consecutive"))
        elif kind == "rollback":
            what = f"loss {_number(event.get('loss'))}, recent median {_number(event.get('median'))}"
            found.append(Incident(kind, step, time, f"{what}; back to step {event.get('to')}, with other samples"))
        elif kind in ("stopped", "failed", "finished"):
            found.append(Incident(kind, step, time, str(event.get("why") or "")))
            open_start = False
    for row in history:
        for key, (old, new) in row.get("changed", {}).items():
            text = f"{key}: {_setting(old)} → {_setting(new)}"
            found.append(Incident("settings", row["step"], row.get("time", 0.0), text))
    return sorted(found, key=lambda one: one.time)


def _start(event: dict[str, Any], before: dict[str, Any] | None) -> list[Incident]:
    step, time, layout = event["step"], event["time"], event.get("layout", "")
    if before is None and not event.get("from_checkpoint"):
        return [Incident("start", step, time, layout)]
    where = f"from step {step}" if event.get("from_checkpoint") else "from the beginning"
    found = [Incident("resume", step, time, f"{where}; {layout}")]
    if before is not None and before.get("layout") != layout:
        found.append(Incident("layout", step, time, f"{before.get('layout')} → {layout}"))
    return found


def _setting(value: Any) -> str:
    return "null" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else str(value)
