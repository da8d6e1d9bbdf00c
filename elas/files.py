"""Atomic writes of JSON files, flushing to disk, and reading of JSONL rows."""

import json
import os
from pathlib import Path
from typing import Any

from elas.errors import UserError


def write_json(path: Path | None, facts: dict) -> None:
    """Write `facts` to `path` atomically (a pipe or device: directly); does nothing if `path` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(facts, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        target = path.resolve()  # so that a symbolic link is kept and its target replaced
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error


def sync(path: Path) -> None:
    """Flush a file to disk; of a folder, its new and renamed entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; lines that are not a JSON object with an integer `step`, as after a kill, are skipped.

    Returns:
        The rows; empty if the file does not exist.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
