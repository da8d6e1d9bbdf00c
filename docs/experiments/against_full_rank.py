"""The table of README: ELAS beside the same shape at full rank and at low rank, from measured result files."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("full-rank SwiGLU", "low-rank relu²", "ELAS")


def table() -> str:
    """One row a measurement: speed of training and decoding, memory, quality after the same tokens."""
    cpu, gpu = _read("step_4x256_float32"), _read("gpu_step_h100")
    decode, names = _read("generate_float32"), ("full_swiglu", "lowrank_relu2", "elas")
    steps, gpu_steps, decodes = ({row["variant"]: row for row in facts["rows"]} for facts in (cpu, gpu, decode))
    quality = [_read(name) for name in ("full_rank_swiglu", "lowrank_relu2", "elas_masked")]
    mib = 2**20
    rows = [
        ("training, tokens/s, CPU", [steps[name]["tokens_per_s"] for name in names], "{:,.0f}"),
        ("training, tokens/s, one GPU", [gpu_steps[name]["tokens_per_s"] for name in names], "{:,.0f}"),
        ("layers keep for the backward pass, MiB", [steps[name]["saved_bytes"] / mib for name in names], "{:,.0f}"),
        ("weights and optimizer state, MiB", [steps[name]["resident_bytes"] / mib for name in names], "{:,.0f}"),
        ("decoding, tokens/s, CPU", [decodes[name]["decode_tokens_per_s"] for name in names], "{:.2f}"),
        ("validation perplexity after the same tokens", [one["ppl"] for one in quality], "{:.1f}"),
    ]
    lines = [f"| | {' | '.join(COLUMNS)} | ELAS ÷ full rank |", "|---" * 5 + "|"]
    for text, values, shown in rows:
        cells = [shown.format(value) for value in values]
        lines.append(f"| {text} | {' | '.join(cells)} | {values[-1] / values[0]:.2f} |")
    shape = f"{cpu['preset']} shape ({cpu['layers']} layers for training), r = h/4, fp32, "
    shape += f"{cpu['threads']} threads of {cpu['device']}"
    tokens = f"{quality[0]['tokens'] / 1e6:.2f} M tokens on a model of width 256, one seed, rates not tuned for each"
    where = f"CPU and memory: the {shape}. GPU: {gpu['preset']}, bf16, {gpu['device']}. Perplexity: {tokens}."
    return "\n".join([*lines, "", where]) + "\n"


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
