"""The table of README: ELAS beside the same shape at full rank and at low rank, from measured result files."""

import json
import statistics
from pathlib import Path

import optimizer_tables

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("full-rank SwiGLU", "low-rank relu²", "ELAS")
OPTIMIZERS = {
    "Muon, on factors with Spectron's steps": ("muon", "spectron", "spectron"),
    "Muon": ("muon",) * 3,
    "AdamW": ("adamw",) * 3,
}
"""Of the columns, by row."""


def table() -> str:
    """One row a measurement: speed of training and decoding, memory, quality after the same tokens."""
    cpu, gpu = _read("step_4x256_float32"), _read("gpu_step_h100")
    decode, names = _read("generate_float32"), ("full_swiglu", "lowrank_relu2", "elas")
    steps, gpu_steps, decodes = ({row["variant"]: row for row in facts["rows"]} for facts in (cpu, gpu, decode))
    quality, seeds = _quality(names)
    mib = 2**20
    rows = [
        ("training, tokens/s, CPU", [steps[name]["tokens_per_s"] for name in names], "{:,.0f}"),
        ("training, tokens/s, one GPU", [gpu_steps[name]["tokens_per_s"] for name in names], "{:,.0f}"),
        ("layers keep for the backward pass, MiB", [steps[name]["saved_bytes"] / mib for name in names], "{:,.0f}"),
        ("weights and AdamW's state, MiB", [steps[name]["resident_bytes"] / mib for name in names], "{:,.0f}"),
        ("decoding, tokens/s, CPU", [decodes[name]["decode_tokens_per_s"] for name in names], "{:.2f}"),
        *((f"validation perplexity, {name}", values, "{:.1f}") for name, values in quality.items()),
    ]
    lines = [f"| | {' | '.join(COLUMNS)} | ELAS ÷ full rank |", "|---" * 5 + "|"]
    for text, values, shown in rows:
        cells = ["–" if value is None else shown.format(value) for value in values]
        lines.append(f"| {text} | {' | '.join(cells)} | {values[-1] / values[0]:.2f} |")
    shape = f"{cpu['preset']} shape ({cpu['layers']} layers for training), r = h/4, fp32, "
    shape += f"{cpu['threads']} threads of {cpu['device']}"
    tokens = (
        "3.07 M tokens on a model of width 256, each at the best of several rates (low-rank relu² at those of ELAS), "
    )
    tokens += "one seed" if seeds == 1 else f"means of {seeds} seeds"
    where = f"CPU and memory: the {shape}. GPU: {gpu['preset']}, bf16, {gpu['device']}. Perplexity: {tokens}."
    return "\n".join([*lines, "", where]) + "\n"


def _quality(models: tuple[str, ...]) -> tuple[dict[str, list], int]:
    """Mean perplexity of each model by optimizer, None where there is none, and the number of seeds."""
    found, seeds = {}, set(range(100))
    for name, optimizers in OPTIMIZERS.items():
        found[name] = [optimizer_tables.perplexities(*pair) for pair in zip(models, optimizers, strict=True)]
        seeds &= set.intersection(*(set(one) for one in found[name] if one))
    means = {name: [statistics.mean(one[seed] for seed in seeds) if one else None for one in by_model]
             for name, by_model in found.items()}  # fmt: skip
    return means, len(seeds)


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
