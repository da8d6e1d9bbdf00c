"""`RUN_DIR/config_history.jsonl`: the settings that changed when a run was resumed, and at which step.

One line per change: `step` (the settings apply to the steps after it), `time` (seconds since 1970), `changed`
{key: [old, new]}; a share of train.steps is a string, `0.25 (500 steps)`. As in metrics.jsonl, lines after the
checkpoint that a run resumes from are dropped, since those steps are repeated.
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
"""Not recorded: these do not change the training, and are reported elsewhere."""


def record(config: Config, resume: Checkpoint | None) -> list[str]:
    """Record the settings that changed since the checkpoint; call it on rank 0 only.

    Returns:
        One line for the console per changed setting.
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
    return lines(changed, step)


def lines(changed: dict[str, list[Any]], step: int) -> list[str]:
    """A line for the console of each setting that `changes` found; they apply after `step`."""
    words = {key: [_in_words(key, value) for value in pair] for key, pair in changed.items()}
    return [f"changed from step {step + 1} on: {key}={new} (was {old})" for key, (old, new) in words.items()]


def changes(config: Config, checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """The settings that differ from the checkpoint's: key to [old, new]."""
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
