"""Writes a run's metrics: `metrics.jsonl`, `validation.jsonl`, and the same scalars to its trackers.

Only rank 0 writes. When a run resumes, lines after the checkpoint are dropped, so that no step appears twice. Each line
is written and flushed at once, so a killed run keeps its curve.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from elas.files import read_jsonl, write_json
from elas.train.trackers import Trackers


class Metrics:
    """The metrics files of one run, and its trackers; a context manager that closes these.

    Args:
        run_dir: the run's folder.
        trackers: take the same values.
        last_step: step of the checkpoint resumed from; 0 for a new run.
        writes: False on all ranks but 0; all methods then do nothing.
    """

    def __init__(self, run_dir: str, trackers: Trackers, *, last_step: int, writes: bool):
        self.writes, self._trackers = writes, trackers
        self._start = time.monotonic()
        if not writes:
            return
        folder = self._folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "validation")}
        for path in self._paths.values():
            _drop_after(path, last_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._trackers.close(failed=kind is not None)

    def drop_after(self, step: int) -> None:
        """Drop the lines after `step`, for a rollback."""
        if self.writes:
            for path in self._paths.values():
                _drop_after(path, step)

    def log(self, name: str, values: dict[str, Any]) -> None:
        """Append a line to `name` (`metrics` or `validation`), and the same values to the trackers.

        `values` must contain `step`; `time` (seconds since 1970) and `elapsed_s` (seconds since this start) are added.
        """
        if not self.writes:
            return
        values = values | {"time": time.time(), "elapsed_s": time.monotonic() - self._start}
        with self._paths[name].open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
        self._trackers.log(values["step"], dict(_scalars(name, values)))

    def facts(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write the run's whole configuration to `config.json`, and facts about this start of it to `run.json`."""
        if self.writes:
            write_json(self._folder / "config.json", config)
            write_json(self._folder / "run.json", facts | {"time": time.time()})


def _scalars(name: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values of a line for trackers: `name/key`, `sources/prefix`, and `layers/key/07` for values by layer."""
    for key, value in values.items():
        if key not in ("step", "time") and isinstance(value, (int, float)):
            yield f"{name}/{key}", float(value)
    for source, samples in values.get("sources", {}).items():
        yield f"sources/{source}", float(samples)
    for key, of_layers in values.get("layers", {}).items():
        for layer, value in enumerate(of_layers):
            if value is not None:
                yield f"layers/{key}/{layer:02d}", value


def _drop_after(path: Path, step: int) -> None:
    """Atomically rewrite a file with only its lines up to `step`; none for step 0."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if row["step"] <= step and step > 0]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)
