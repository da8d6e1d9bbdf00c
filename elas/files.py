"""Files that are there whole or not at all, and rows of JSON lines."""

import json
import os
from pathlib import Path
from typing import Any

from elas.errors import UserError


def write_json(path: Path | None, facts: dict) -> None:
    """Write `facts` to `path` (nothing when None), whole or not at all; straight into a pipe or a device."""
    if path is None:
        return
    text = json.dumps(facts, indent=2) + "\n"
    if path.exists() and not path.is_file():
        try:
            path.write_text(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; what is no row with a step, such as a line cut short by a kill, is left out."""
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
