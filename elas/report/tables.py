"""The page's tables: summary, time, plan against actual, incidents, evaluations, configuration."""

import math
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from elas.config import Config
from elas.console import clock
from elas.report.incidents import KINDS
from elas.report.run_files import Row, RunFiles

MOST_INCIDENTS = 200
COUNTED = {"resume": "resumed", "skipped": "skipped", "rollback": "rolled back", "killed": "killed", "failed": "failed"}
"""Kinds of incidents that the summary counts."""
TIMES = (
    ("steps", "train_s"),
    ("validation", "validation_s"),
    ("saving", "save_s"),
    ("starting", "start_s"),
    ("lost", "lost_s"),
)
"""Where the time went, in words, and the columns of metrics.jsonl."""


def last(run: RunFiles, key: str) -> Any:
    """The last value of a key of metrics.jsonl that is not null; None without any."""
    return next((row[key] for row in reversed(run.metrics) if row.get(key) is not None), None)


def summary(run: RunFiles) -> list[tuple[str, str, str]]:
    """Cards: what, its value, a note."""
    rows, end = run.metrics, run.metrics[-1]
    steps = run.config.get("train", {}).get("steps")
    cards = [("tokens", _short(end["tokens"]), f"step {end['step']:,}" + (f" of {steps:,}" if steps else ""))]
    if run.validation:
        first, final = run.validation[0], run.validation[-1]
        best = min(run.validation, key=lambda row: row["loss"])
        note = f"from {first['ppl']:,.0f} at step {first['step']:,}" if first is not final else ""
        if best is not final:
            note = f"best {best['ppl']:,.2f} at step {best['step']:,}"
        cards.append(("validation perplexity", f"{final['ppl']:,.2f}", note))
    cards.append(("training loss", f"{end.get('loss_mean', end['loss']):.4f}", "nats a token"))
    rates = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    if rates:
        ranks = run.facts.get("world_size")
        note = f"median, {ranks} rank{'s' if ranks != 1 else ''}" if ranks else "median"
        cards.append(("tokens/s", f"{statistics.median(rates):,.0f}", note))
    if last(run, "mfu") is not None:
        cards.append(("MFU", f"{_median(rows, 'mfu'):.1%}", f"of {last(run, 'peak_tflops'):,.0f} TFLOP/s"))
    elif last(run, "tflops_per_rank") is not None:
        cards.append(("model GFLOP/s", f"{1e3 * _median(rows, 'tflops_per_rank'):,.1f}", "a rank; its peak is unknown"))
    if last(run, "goodput") is not None:
        cards.append(("goodput", f"{last(run, 'goodput'):.1%}", "of the time since the first start"))
    memory = [row["memory_peak_bytes"] for row in rows if row.get("memory_peak_bytes")]
    if memory:
        cards.append(("peak memory", f"{max(memory) / 1e9:.2f} GB", "rank 0"))
    if last(run, "sparsity") is not None:
        dropped = last(run, "dropped")
        note = f"2:4 drops {dropped:.1%} of the rest" if dropped and last(run, "sparse_active") else "of the activation"
        cards.append(("zeros", f"{last(run, 'sparsity'):.1%}", note))
    kinds = [one.kind for one in run.incidents]
    said = [f"{kinds.count(kind)} {what}" for kind, what in COUNTED.items() if kind in kinds]
    card = ("incidents", ", ".join(said) or "none", "") if kinds else ("incidents", "–", "not recorded")
    cards.append(card)
    return cards


def comparison(runs: list[RunFiles]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The summaries of several runs side by side: what, and value and note of each."""
    found = [{what: (value, note) for what, value, note in summary(run)} for run in runs]
    names = dict.fromkeys(what for one in found for what in one)
    return [(what, [one.get(what, ("–", "")) for one in found]) for what in names]


def times(run: RunFiles) -> list[tuple[str, float, str]]:
    """Where the time since the first start went: what, share, duration. Empty for runs without goodput."""
    end = run.metrics[-1]
    if end.get("goodput") is None:
        return []
    others = {key: float(end.get(key) or 0.0) for _, key in TIMES[1:]}
    share = min(0.9999, float(end["goodput"]))
    seconds = {"train_s": share / (1 - share) * sum(others.values()), **others}
    whole = sum(seconds.values()) or 1.0
    return [(what, seconds[key] / whole, clock(seconds[key])) for what, key in TIMES]


def plan(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Plan against actual: what, planned, actual, how far apart."""
    facts, end = run.facts, run.metrics[-1]
    found = []
    planned = facts.get("memory_bytes")
    used = max((row["memory_peak_bytes"] for row in run.metrics if row.get("memory_peak_bytes")), default=None)
    if planned and used:
        found.append(("memory a rank", f"{planned / 1e9:.2f} GB", f"{used / 1e9:.2f} GB", _apart(used, planned)))
    if facts.get("tokens"):
        found.append(("tokens", f"{facts['tokens']:,}", f"{end['tokens']:,}", _apart(end["tokens"], facts["tokens"])))
    if facts.get("planned_parameters") and facts.get("parameters"):
        a, b = facts["parameters"], facts["planned_parameters"]
        found.append(("parameters", f"{b:,}", f"{a:,}", _apart(a, b)))
    steps = run.config.get("train", {}).get("steps")
    if steps:
        found.append(("steps", f"{steps:,}", f"{end['step']:,}", _apart(end["step"], steps)))
    return found


def incidents(run: RunFiles) -> tuple[list[tuple[str, str, str, str, str]], int]:
    """Kind, what it is called, step, time (UTC) and text of the incidents, and how many more there are."""
    shown = run.incidents[:MOST_INCIDENTS]
    rows = [(one.kind, KINDS[one.kind], f"{one.step:,}", _date(one.time), one.text) for one in shown]
    return rows, len(run.incidents) - len(shown)


def evaluations(run: RunFiles) -> list[tuple[str, ...]]:
    """Rows of evaluations: file, data or task, step, loss, perplexity, bits a byte, accuracy."""
    rows = []
    for name, facts in run.evaluations:
        step = facts.get("step")
        where = "" if step is None else f"{step:,}" if isinstance(step, int) else str(step)
        if isinstance(facts.get("results"), dict):
            for task, values in facts["results"].items():
                value = next((f"{v:.4f}" for k, v in values.items() if k.startswith("acc,") and _finite(v)), "")
                rows.append((name, str(task), where, "", "", "", value))
        else:
            loss = facts.get("loss")
            ppl = facts.get("perplexity", facts.get("ppl"))
            numbers = [f"{v:,.4f}" if _finite(v) else "" for v in (loss, ppl, facts.get("bits_per_byte"))]
            rows.append((name, str(facts.get("data", "")), where, *numbers, ""))
    return rows


def settings(run: RunFiles) -> list[tuple[str, str, str]]:
    """Every setting: key, value, and the default where it differs, else ""."""
    defaults = _flat(Config().to_dict())
    found = []
    for key, value in _flat(run.config).items():
        default = defaults.get(key)
        found.append((key, _shown(value), _shown(default) if key in defaults and default != value else ""))
    return found


def differences(runs: list[RunFiles]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ, with the value of each; without paths of the runs themselves."""
    flats = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found = []
    for key in keys:
        values = [flat.get(key) for flat in flats]
        if key != "train.run_dir" and any(value != values[0] for value in values):
            found.append((key, [_shown(value) for value in values]))
    return found


def facts_line(run: RunFiles) -> str:
    """Layout, kernel and parameters."""
    facts = run.facts
    parts = [f"{facts['parameters'] / 1e6:,.1f} M parameters" if facts.get("parameters") else ""]
    dtype = run.config.get("train", {}).get("dtype")
    parts += [
        str(dtype or ""),
        str(facts.get("layout", "")),
        f"FFN kernel {facts['kernel']}" if "kernel" in facts else "",
    ]
    return " · ".join(part for part in parts if part)


def dates(run: RunFiles) -> str:
    """First start, and the last line or event."""
    times = [row["time"] for row in (*run.metrics, *run.validation) if row.get("time")]
    end = max([*times, *(one.time for one in run.incidents)], default=run.began)
    return f"{_date(run.began)} to {_date(end)} UTC" if run.began else ""


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in config.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _apart(actual: float, planned: float) -> str:
    return "equal" if actual == planned else f"{actual / planned - 1:+.1%}"


def _median(rows: Iterable[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows if row.get(key) is not None)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"
