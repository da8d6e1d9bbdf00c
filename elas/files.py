"""Atomic writes of JSON files, and reading of JSONL rows."""

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
    if path.exists() and not path.is_file():
        try:
            path.write_text(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error
        return
    path = path.resolve()  # so that a symbolic link is kept and its target replaced
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error


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
