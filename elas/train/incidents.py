"""`RUN_DIR/events.jsonl`: starts, skipped steps, rollbacks and how each start ended, for `elas report`.

One line an event: `event`, `step`, `time` (seconds since 1970) and its facts. Unlike metrics.jsonl it is only appended
to: what a later start repeats remains here. A start without an end was killed, or its host was lost.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

NAME = "events.jsonl"
Event = Literal["start", "skipped", "rollback", "stopped", "failed", "finished"]


class Incidents:
    """The events of one start.

    Args:
        run_dir: the run's folder.
        writes: False on all ranks but 0, where nothing is written.
    """

    def __init__(self, run_dir: str, *, writes: bool):
        self._path = Path(run_dir) / NAME if writes else None

    def note(self, event: Event, step: int, **facts: Any) -> None:
        """Append an event after `step`; non-finite numbers are written as words."""
        if self._path is None:
            return
        facts = {key: value if _finite(value) else str(value) for key, value in facts.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, "time": time.time(), **facts}) + "\n")


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or value - value == 0
