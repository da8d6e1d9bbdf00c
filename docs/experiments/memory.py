"""The tables and the picture of docs/memory.md; `python docs/experiments/memory.py` draws docs/figures/memory.png."""

import json
import sys
from pathlib import Path

from elas.bench.step_models import Shape, variant_config
from elas.plan.memory import token_parts

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / "figures" / "memory.png"
NAMES = {
    "hf_llama": "transformers' Llama, full rank",
    "hf_llama_checkpointed": "the same with gradient checkpointing",
    "full_swiglu_logits": "full-rank SwiGLU, loss from logits",
    "full_swiglu": "full-rank SwiGLU",
    "lowrank_swiglu": "low-rank SwiGLU, all kept",
    "lowrank_relu2": "low-rank relu² without 2:4, all kept",
    "elas_kept": "ELAS, recompute none",
    "elas": "ELAS, recompute bottleneck",
    "elas_layer": "ELAS, recompute layer",
}
COLORS = {
    "norm inputs": "#35618f", "norm outputs": "#7ba7cf", "q, k, v": "#c8553d", "attention output": "#e39b6d",
    "bottlenecks": "#5b8c5a", "FFN": "#b9a44c", "small": "#888888",
}  # fmt: skip
RATIOS = [
    ("saved_bytes", "elas", "full_swiglu", "layers keep: ELAS ÷ full-rank SwiGLU"),
    ("saved_bytes", "elas", "full_swiglu_logits", "layers keep: ELAS ÷ full-rank SwiGLU"),
    ("saved_bytes", "elas", "lowrank_relu2", "layers keep: ELAS ÷ low-rank relu²"),
    ("tokens_per_s", "elas", "elas_kept", "tokens/s: recompute bottleneck ÷ none"),
    ("head_bytes", "elas", "full_swiglu_logits", "head and loss: in chunks ÷ from logits"),
    ("above_bytes", "elas", "full_swiglu_logits", "a step's peak above the state: ELAS ÷ full rank, loss from logits"),
    ("above_bytes", "elas", "hf_llama", "the same: ELAS ÷ transformers' Llama"),
    ("above_bytes", "elas", "hf_llama_checkpointed", "the same: ELAS ÷ Llama with gradient checkpointing"),
    ("tokens_per_s", "elas", "full_swiglu", "tokens/s: ELAS ÷ full-rank SwiGLU"),
    ("tokens_per_s", "elas", "hf_llama", "tokens/s: ELAS ÷ transformers' Llama"),
    ("tokens_per_s", "elas", "hf_llama_checkpointed", "tokens/s: ELAS ÷ Llama with gradient checkpointing"),
]


def read(name: str) -> dict:
    """One result file."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def found(prefix: str) -> list[dict]:
    """The result files with this prefix, in order."""
    files = sorted((HERE / "results").glob(f"{prefix}*.json"), reverse=True)
    return sorted((json.loads(path.read_text()) for path in files), key=lambda facts: -facts["repeats"])


def step_account() -> str:
    """What one layer keeps for each token, in units of h, by formula and measured."""
    facts = read("step_4x256_float32")
    shape = Shape(*(facts[key] for key in ("preset", "layers", "batch", "seq", "zero")))
    lines = [f"| values a token and layer, ÷ h | {' | '.join(COLORS)} | sum | measured |", "|---" * 10 + "|"]
    for name in ("full_swiglu", "lowrank_relu2", "elas_kept", "elas"):
        row = next(row for row in facts["rows"] if row["variant"] == name)
        config = variant_config(name, shape, "float32")
        parts = token_parts(config, 4)
        unit = 4 * config.model.hidden_size
        tokens = facts["batch"] * facts["seq"] * config.model.num_layers
        cells = [parts.get(part, 0) / unit for part in COLORS]
        cells += [sum(parts.values()) / unit, row["saved_bytes"] / tokens / unit]
        lines.append(f"| {NAMES[name]} | {' | '.join(f'{cell:.2f}' if cell else '–' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def steps(prefix: str) -> str:
    """Rows and ratios of the runs of `elas bench step` with one shape."""
    lines = [
        "| | | tokens/s | layers keep, MiB | head and loss | peak above the state | state | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str], str] = {}
    for facts in found(prefix):
        rows = {row["variant"]: row for row in facts["rows"]}
        for name in (name for name in NAMES if name in rows):
            row = rows[name]
            speed = "–" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"
            keys = ("saved_bytes", "head_bytes", "above_bytes", "resident_bytes", "peak_bytes")
            sizes = " | ".join(f"{row[key] / 2**20:,.0f}" for key in keys)
            lines.append(f"| {NAMES[name]} | {row['dtype']} | {speed} | {sizes} |")
        for what, of, to, text in RATIOS:
            if of in rows and to in rows and rows[of][what] and rows[to][what]:
                ratios.setdefault((text, rows[of]["dtype"]), f"{rows[of][what] / rows[to][what]:.2f}")
    dtypes = list(dict.fromkeys(dtype for _, dtype in ratios))
    lines += ["", f"| ratio | {' | '.join(dtypes)} |", "|---" * (1 + len(dtypes)) + "|"]
    for text in dict.fromkeys(text for _, _, _, text in RATIOS):
        if any((text, dtype) in ratios for dtype in dtypes):
            lines.append(f"| {text} | {' | '.join(ratios.get((text, dtype), '–') for dtype in dtypes)} |")
    facts = found(prefix)[0]
    where = (
        f"{facts['preset']}, {facts['layers']} layers, {facts['batch']} × {facts['seq']} tokens, {facts['device']}, "
    )
    rounds = [facts["repeats"] for facts in found(prefix)]
    how = f"medians of {rounds[0]}"
    if len(set(rounds)) > 1:
        how = f"ratios are within one run; rounds of the runs: {', '.join(map(str, rounds))}"
        how += " (0: memory only)" if 0 in rounds else ""
    return "\n".join([*lines, "", f"{where}{facts['threads']} threads; {how}."]) + "\n"


def step_small() -> str:
    """4 × 256 tokens."""
    return steps("step_4x256")


def step_large() -> str:
    """16 × 1024 tokens."""
    return steps("step_16x1024")


def micro_batch() -> str:
    """The largest micro-batches in the memory of a cgroup."""
    facts = read("micro_batch")
    first = facts["rows"][0]["samples"]
    lines = ["| | samples | ÷ first |", "|---|---|---|"]
    for row in facts["rows"]:
        least = "at least " if row.get("more_may_fit") else ""
        ratio = f"{row['samples'] / first:.1f}" if first else "–"
        lines.append(f"| {NAMES[row['variant']]} | {least}{row['samples']:,} | {least}{ratio} |")
    what = f"{facts['preset']}, {facts['dtype']}, {facts['seq']} tokens a sample, {facts['gib']:g} GiB"
    return "\n".join([*lines, "", f"{what}; to 5 %."]) + "\n"


def loss() -> str:
    """Ways to compute head and cross entropy."""
    lines = ["| | | seconds | peak, MiB | error of the loss | of d hidden | of d weight |", "|---" * 7 + "|"]
    names = {"ours": "ours", "logits": "all logits", "linear_cross_entropy": "torch's `linear_cross_entropy`"}
    for row in read("loss")["rows"]:
        shape = f"{row['tokens']:,} × {row['hidden']:,}, {row['vocabulary']:,} in the vocabulary, {row['dtype']}"
        errors = " | ".join(f"{row[f'{what}_error']:.1e}" for what in ("loss", "hidden", "weight"))
        lines.append(
            f"| {names[row['way']]} | {shape} | {row['seconds']:.2f} | {row['peak_bytes'] / 2**20:,.0f} | {errors} |"
        )
    return "\n".join(lines) + "\n"


def dry_run() -> str:
    """Estimates of `elas train --dry-run` and the memory of runs."""
    lines = ["| model | micro-batch | estimated, MB | measured | off by | returning freed memory | off by |"]
    lines.append("|---" * 7 + "|")
    for row in read("dry_run")["rows"]:
        estimated = row["estimated"] / 1e6
        cells = [f"{row['case']} | {row['batch']} × 256 | {estimated:,.0f}"]
        for name in ("measured", "returning"):
            measured = row[name] / 1e6
            cells.append(f"{measured:,.0f} | {estimated / measured - 1:+.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw() -> Path:
    """Bars of what one layer keeps for each token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = Shape("350m", 8, 4, 256, 0)
    names = ["full_swiglu", "lowrank_swiglu", "lowrank_relu2", "elas_kept", "elas"]
    figure, axes = plt.subplots(figsize=(9.5, 3.4), layout="constrained")
    left = [0.0] * len(names)
    parts = [token_parts(variant_config(name, shape, "bfloat16"), 2) for name in names]
    for part, color in COLORS.items():
        widths = [one.get(part, 0) / 2048 for one in parts]
        axes.barh([NAMES[name] for name in names], widths, left=left, color=color, label=part, height=0.62)
        left = [a + b for a, b in zip(left, widths)]
    for y, total in enumerate(left):
        axes.text(total + 0.15, y, f"{total:.1f}", va="center", fontsize=9, color="#444444")
    axes.invert_yaxis()
    axes.set(xlabel="bf16 values kept for each token and layer, in units of h (350m: h = 1024, r = h / 4)")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, 1.28), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, dpi=130)
    return FIGURE


if __name__ == "__main__":
    print(draw())
    sys.exit(0)
