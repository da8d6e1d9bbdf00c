"""The tables of docs/plan.md, from plan_check.json and plan_published.json."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = {
    "forward and backward": ("products", "memory", "host"),
    "collectives": ("tensor", "data"),
    "messages and bubble": ("pipeline", "bubble"),
    "update": ("update",),
}
"""Parts of a step as they can be measured, and what is predicted of each."""


def read(name: str) -> dict:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def check() -> str:
    """Predicted / measured seconds of every layout, the parts, and how far off the step is."""
    facts = read("plan_check")
    lines = [f"| predicted / measured, s | {' | '.join(PARTS)} | step | off | exact components |", "|---" * 8 + "|"]
    for row in facts["rows"]:
        cells = []
        for name, parts in PARTS.items():
            predicted, measured = sum(row["predicted_parts"][part] for part in parts), row["measured_parts"][name]
            cells.append("–" if max(predicted, measured) < 5e-3 else f"{predicted:.2f} / {measured:.2f}")
        off = row["predicted_s"] / row["measured_s"] - 1
        differ = ", ".join(row["differ"]) if row["differ"] else "agree"
        step = f"{row['predicted_s']:.2f} / {row['measured_s']:.2f}"
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {step} | {off:+.0%} | {differ} |")
    offs = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in facts["rows"]]
    within = sum(off <= 0.3 for off in offs)
    measured = facts["measured"]
    more = f"{within} of {len(offs)} steps are within 30 %, the worst is off by {max(offs):.0%}. {measured['name']}, "
    more += f"{measured['ranks']} cores, torch {measured['about']['torch']}, {facts['date']}; medians of "
    more += f"{len(facts['rows'][0]['steps_s'])} steps. {_quiet(facts)}"
    return "\n".join([*lines, "", more]) + "\n"


def _quiet(facts: dict) -> str:
    load = f"load average before and after {facts['load_before']:.1f} and {facts['load_after']:.1f}"
    if max(facts["load_before"], facts["load_after"]) < 1.5 * facts["measured"]["ranks"]:
        return f"{load[0].upper()}{load[1:]}."
    return f"The machine was not quiet ({load}): other work took part of the cores, and not always the same part."


def parameters() -> str:
    """Published and counted parameters."""
    lines = ["| preset | published | ours | off |", "|---|---|---|---|"]
    for row in read("plan_published")["parameters"]:
        off = row["ours"] / row["published"] - 1
        lines.append(f"| {row['preset']} | {row['published']:,} | {row['ours']:,.1f} | {off:+.1%} |")
    return "\n".join(lines) + "\n"


def activations() -> str:
    """Bytes a token over h by their formula and by ours."""
    header = "| | published | published, without scores | ours | published, with the differences below |"
    lines = [header, "|---|---|---|---|---|"]
    for row in read("plan_published")["activations"]:
        name = f"{row['model']}{', sequence parallel' if row['sequence'] else ''}"
        cells = [f"{row[key]:.2f}" for key in ("published", "selective", "ours", "explained")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def boost() -> str:
    """Volume, products and seconds of a step."""
    facts = read("plan_published")["boost"]
    header = "| | sent by a rank, values a token and layer ÷ h | products of linears, ÷ 6h² | predicted s |"
    lines = [header + " published s |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        name = f"{row['model']}{', sequence parallel' if row['sequence'] else ''}"
        cells = [f"{row[key]:.2f}" for key in ("sent_over_h", "linear_over_h2", "ours_s", "published_s")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    by = {(row["model"], row["sequence"]): row for row in facts["rows"]}
    ratios = {
        kind: by["full rank", sequence]["ours_s"] / by["bottleneck", sequence]["ours_s"]
        for kind, sequence in (("with sequence parallelism", True), ("without", False))
    }
    said = facts["published_s"]["full rank"] / facts["published_s"]["bottleneck"]
    shown = ", ".join(f"{ratio:.2f} {kind}" for kind, ratio in ratios.items())
    return "\n".join([*lines, "", f"Full rank ÷ bottleneck: published {said:.2f}, predicted {shown}."]) + "\n"
