"""`RUN_DIR/config_history.jsonl`: which settings changed, and from which step, when a run went on with others.

A line a change: `step` (the settings hold for the steps after it), `time` (seconds since 1970), `changed`
{key: [old, new]}; a share of train.steps is a text, `0.25 (500 steps)`. As in metrics.jsonl, what was recorded after
the checkpoint that a run goes on from is dropped: those steps are taken anew.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import typed, written_config
from elas.config import KEYS, Config
from elas.config.shares import SHARES
from elas.files import read_jsonl

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
        kept.append({"step": step, "time": time.time(), "changed": changed})
    if kept or path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
    words = {key: [_in_words(key, value) for value in pair] for key, pair in changed.items()}
    return [f"changed from step {step + 1} on: {key}={new} (was {old})" for key, (old, new) in words.items()]


def changes(config: Config, checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Settings that are not those of the checkpoint: key to the old and the new value."""
    written, shares = written_config(checkpoint), checkpoint.manifest.get("shares", {})
    found = {}
    for key in KEYS:
        old, new = typed(written, key), typed(config, key)
        if key not in _WHERE and old != new:
            found[key] = [_as_given(old, shares.get(key)), _as_given(new, config.shares.get(key))]
    return found


def _as_given(value: Any, share: float | None) -> Any:
    return value if share is None else f"{share} ({value} step{'s' if value != 1 else ''})"


def _in_words(key: str, value: Any) -> str:
    return value if key in SHARES and isinstance(value, str) else repr(value)
