"""The part `speed`: the benchmarks of the FFN and of the training step, a process for each shape."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elas.gpu_check import processes
from elas.gpu_check.parts import NO_CUDA
from elas.gpu_check.rows import NO_TIME, Row
from elas.gpu_check.setting import Setting

ROOFLINE = ("tflops", "peak_share", "bandwidth_share")
LEAST_S = 20.0


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Args:
        name: of its rows and log.
        arguments: after `elas bench`.
        limit_s: time limit in seconds.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float = 150.0


def _ffn(shape: str, *more: str) -> Bench:
    return Bench(f"ffn {shape}", ("ffn", "--shapes", shape, "--dtypes", "bfloat16", *more))


GPU = [
    *(_ffn(shape, "--device", "cuda", "--tokens", "16384") for shape in ("60m", "350m", "1b")),
    Bench("step 60m", ("step", "--device", "cuda", "--preset", "60m", "--dtypes", "bfloat16")),
]
CPU = [Bench("ffn 60m", ("ffn", "--shapes", "60m", "--dtypes", "float32", "--tokens", "256", "--repeats", "1"))]
"""Of a dry run; in fp32, since bf16 products are slow on many CPUs."""


def run(setting: Setting) -> None:
    """Write the rows of this part."""
    for bench in CPU if setting.dry_run else GPU:
        for row in _measured(setting, bench):
            setting.add(row)
    if setting.dry_run:
        setting.add(Row(part="speed", group=GPU[-1].name, result="not run", reason=NO_CUDA))


def _measured(setting: Setting, bench: Bench) -> list[Row]:
    limit = min(bench.limit_s, setting.left_s)
    if limit < LEAST_S:
        return [Row(part="speed", group=bench.name, result="not run", reason=NO_TIME)]
    file = setting.logs / f"speed-{bench.name.replace(' ', '-')}.json"
    log = file.with_suffix(".log")
    command = [sys.executable, "-m", "elas.cli", "bench", *bench.arguments, "--json", str(file)]
    process = processes.start(command, log)
    try:
        in_time = processes.wait(process, limit)
        now = processes.last_line(log)
    finally:
        processes.end(process)
    found = rows_of(bench, _read(file))
    if not in_time and limit < bench.limit_s:
        found.append(Row(part="speed", group=bench.name, result="not run", reason=NO_TIME))
    elif not in_time:
        reason = f"not complete after {limit:.0f} s, killed; {log.name} ends: {now}"
        found.append(Row(part="speed", group=bench.name, result="wrong", reason=reason))
    elif process.returncode and all(row.result != "wrong" for row in found):
        reason = processes.ended(process, log)
        found.append(Row(part="speed", group=bench.name, result="wrong", reason=reason))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def rows_of(bench: Bench, facts: dict[str, Any]) -> list[Row]:
    """Rows of a benchmark's results, one for each variant, and one for each that was left out."""
    measured = facts.get("rows", [])
    found = []
    for row in measured:
        milliseconds = _milliseconds(row)
        group = f"{bench.name} {row['dtype']} {row['variant']}"
        if milliseconds is None:
            error, most = row.get("rel_err"), row.get("bound")
            reason = _wrong_step(row) if error is None else "against fp64"
            found.append(Row(part="speed", group=group, result="wrong", reason=reason, error=error, bound=most))
            continue
        speed = {
            "ms": milliseconds,
            **{key: row[key] for key in ("tokens_per_s", "host_ms", *ROOFLINE) if row.get(key)},
        }
        if row["variant"].startswith("elas"):
            speed["times_as_fast_as"] = _ratios(row, measured)
        found.append(Row(part="speed", group=group, result="right", error=row.get("rel_err"), bound=row.get("bound"),
                         speed=speed))  # fmt: skip
    left_out = [note for note in facts.get("notes", []) if "left out" in note]
    return found + [Row(part="speed", group=bench.name, result="not run", reason=note) for note in left_out]


def _ratios(row: dict, measured: list[dict]) -> dict[str, float]:
    """How many times as fast a row is as every other variant of its dtype that was timed."""
    mine, found = _milliseconds(row), {}
    for other in measured:
        theirs = _milliseconds(other)
        if other["dtype"] == row["dtype"] and other["variant"] != row["variant"] and mine and theirs:
            found[other["variant"]] = theirs / mine
    return found


def _milliseconds(row: dict) -> float | None:
    """Time of a row: of a step, or of forward and backward together; None if it is wrong."""
    if "fwd_ms" in row:
        return None if row["fwd_ms"] is None else row["fwd_ms"] + row["bwd_ms"]
    return row["step_ms"]


def _wrong_step(row: dict) -> str:
    return (
        f"first step: loss {row['loss']:.5f}, gradient norm {row['grad_norm']:.4f}; "
        f"expected {row['expected_loss']:.5f} and {row['expected_grad_norm']:.4f}"
    )
