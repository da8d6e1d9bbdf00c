"""`RUN_DIR/config_history.jsonl`: which settings changed, and from which step, when a run went on with others.

A line a change: `step` (the settings hold for the steps after it), `time` (UTC), `changed` {key: [old, new]}. As in
metrics.jsonl, what was recorded after the checkpoint that a run goes on from is dropped: those steps are taken anew.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import typed, written_config
from elas.config import KEYS, Config
from elas.train.metrics import read_jsonl

NAME = "config_history.jsonl"
_WHERE = {"train.run_dir", "checkpoint.resume"}
"""Where a run lies and what it goes on from, which is said elsewhere."""


def record(config: Config, resume: Checkpoint | None) -> list[str]:
    """Write down what changed since the checkpoint; rank 0 calls it.

    Returns:
        A line for each setting that changed.
    """
    path = Path(config.train.run_dir) / NAME
    step = resume.step if resume else 0
    kept = [row for row in read_jsonl(path) if row["step"] < step]
    changed = changes(config, resume) if resume else {}
    if changed:
        kept.append({"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed})
    if kept or path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
    return [f"changed from step {step + 1} on: {key}={new!r} (was {old!r})" for key, (old, new) in changed.items()]


def changes(config: Config, checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Settings that are not those of the checkpoint: key to the old and the new value."""
    written = written_config(checkpoint)
    pairs = {key: [typed(written, key), typed(config, key)] for key in KEYS if key not in _WHERE}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
