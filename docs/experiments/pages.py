"""Figures in README and docs come from result files: `python docs/experiments/pages.py` writes them there.

A page holds blocks between `<!-- results: NAME -->` and `<!-- /results -->`; what stands between is made by the
function of that name below, from the JSON files in docs/experiments/results. `--check` changes nothing and fails when a
page and the result files differ, as a test does.

| result file | command that writes it |
|---|---|
| quickstart.json | `elas quickstart --json docs/experiments/results/quickstart.json` |
| quickstart_rates.json | `python docs/experiments/quickstart.py` |
| megatron.json | `python tests/megatron/study.py CHECKOUT --json docs/experiments/results/megatron.json` |
| generate_DTYPE.json | `elas bench generate --dtypes DTYPE --batches 1 --contexts 512 --json …` (docs/generate.md) |
| gpu_ffn_GPU.json | `elas bench ffn --device cuda --dtypes bfloat16 --tokens 16384 --variants … --json …` |
| gpu_step_GPU.json | `elas bench step --device cuda --preset 60m --dtypes bfloat16 --batch 128 --variants … --json …` |
| step_SHAPE_DTYPE.json, recompute_4x256_bfloat16.json | `elas bench step --preset 350m --layers 8 …` (docs/memory.md) |
| micro_batch.json, loss.json, dry_run.json, report.json, metrics_cost.json | `python docs/experiments/NAME.py` |
| optimizers.json | `python docs/experiments/optimizers.py rates`, `three_million`, `twins`, `transfer` |
| optimizers_unscaled.json | `transfer` before Muon's steps had the factor √(256/h): now with rates × √(h/256) |
| optimizer_pace.json, muon_cost.json, rebalance.json, with_and_without.json | `python docs/experiments/NAME.py` |
| plan_check.json, plan_published.json | `python docs/experiments/NAME.py` |
| engines.json | `python tests/export/engines.py RUN --vllm PYTHON --llama PYTHON --llama-cpp CHECKOUT --json …` |
| EXPERIMENT.json | `python docs/experiments/run.py EXPERIMENT` |
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import against_full_rank
import memory
import metrics_cost
import optimizer_tables
import plan
import report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
WITH_FIGURES = (
    "index", "results", "kernels", "megatron", "generate", "export", "memory", "metrics", "plan", "report",
)  # fmt: skip
PAGES = ("README.md", *(f"docs/{name}.md" for name in WITH_FIGURES))
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)

EXPERIMENTS = {
    "elas_loro_no_refresh": "ELAS, LORO with exact steps every 150, no refresh (rate 0.003)",
    "elas_loro": "ELAS, LORO with exact steps and refresh every 150 (0.003)",
    "elas_loro_refresh_only": "ELAS, LORO with refresh every 150, no exact steps (0.003)",
    "cola": "CoLA (SiLU between the factors)",
    "elas_masked": "ELAS, masked gradient, 2:4 from step 100",
    "elas_ste": "ELAS, straight-through gradient",
    "elas_soft_threshold": "ELAS, soft threshold",
    "elas_dense_steps_0": "ELAS, 2:4 from the first step",
    "elas_split_backward": "ELAS, split backward (weight gradients sparse along tokens)",
    "elas_dense_steps_300": "ELAS, 2:4 from step 300",
    "lowrank_relu2": "low-rank relu², no 2:4",
    "cola_relu2_24": "CoLA, relu² and 2:4 between its factors",
}
"""What each experiment is called in the table."""


DECODED = {
    "hf_llama": "transformers' Llama, full rank",
    "full_swiglu": "full rank",
    "lowrank_relu2": "low rank, relu²",
    "elas": "ELAS",
    "elas_latent": "ELAS, latent values",
    "dense_export": "ELAS, exported dense",
}
DECODE_RATIOS = [
    ("lowrank_relu2", "full_swiglu", "low rank ÷ full rank"),
    ("elas", "lowrank_relu2", "ELAS ÷ low rank"),
    ("elas", "hf_llama", "ELAS ÷ transformers' Llama"),
]


def read(name: str):
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def quickstart() -> str:
    """The end of `elas quickstart`, as it prints it."""
    facts = read("quickstart")
    lines = [
        ("model", facts["model"]),
        ("tokens trained", f"{facts['tokens_trained']:,}"),
        ("validation perplexity", f"{facts['val_ppl_start']:,.0f} → {facts['val_ppl_end']:,.1f}"),
        ("zeros after relu²", f"{facts['sparsity']:.1%}"),
        ("non-zeros dropped by 2:4", f"{facts['dropped']:.1%}"),
        ("tokens a second", f"{facts['tokens_per_s']:,.0f} on {facts['world_size']} ranks"),
        ("minutes", f"{facts['seconds'] / 60:.1f}, from text to curves, on {facts['cpu']}"),
    ]
    return "```\n" + "".join(f"{name:<26} {value}\n" for name, value in lines) + "```\n"


def quickstart_rates() -> str:
    """Final perplexity of the quickstart by corpus, rate and seed."""
    rows = read("quickstart_rates")["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| corpus | rate | " + " | ".join(f"seed {seed}" for seed in seeds) + " | largest ÷ smallest |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    names = {"stdlib": "standard library", "stdlib_less_20": "the same without its 20 largest files"}
    for corpus, rate in sorted({(row["corpus"], row["lr"]) for row in rows}):
        ppl = {row["seed"]: row["ppl"] for row in rows if (row["corpus"], row["lr"]) == (corpus, rate)}
        cells = [f"{ppl[seed]:.1f}" if seed in ppl else "–" for seed in seeds]
        spread = max(ppl.values()) / min(ppl.values())
        lines.append(f"| {names[corpus]} | {rate:g} | {' | '.join(cells)} | {spread:.3f} |")
    return "\n".join(lines) + "\n"


def experiments() -> str:
    """The 3 M-token comparisons, the lowest perplexity first."""
    results = {name: read(name) for name in EXPERIMENTS}
    lines = ["| experiment | validation perplexity | zeros | dropped |", "|---|---|---|---|"]
    for name, row in sorted(results.items(), key=lambda item: item[1]["ppl"]):
        # A gated FFN, and CoLA's SiLU, make no zeros.
        shares = (f"{100 * row[key]:.1f} %" if row[key] else "–" for key in ("sparsity", "dropped"))
        lines.append(f"| {EXPERIMENTS[name]} | {row['ppl']:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def megatron() -> str:
    """Every run of the study in Megatron-LM's loop, against what it must agree with."""
    facts = read("megatron")
    lines = ["| run | losses differ by at most | allowed | norms |", "|---|---|---|---|"]
    for row in facts["runs"]:
        norm = "" if row["norm"] is None else f"{row['norm']:.1e}"
        lines.append(f"| {row['run']} | {row['loss']:.1e} | {row['bound']:g} | {norm} |")
    first, last = facts["reference"][0]["loss"], facts["reference"][-1]["loss"]
    more = f"The loss falls from {first:.3f} to {last:.3f} in {facts['steps']} steps. "
    more += f"Without 2:4 the first sparse step's differs by {facts['sparse_differs']:.1e}."
    return "\n".join([*lines, "", more]) + "\n"


def generate() -> str:
    """Decoding side by side, and its ratios, one column a dtype."""
    found = {dtype: read(f"generate_{dtype}") for dtype in ("float32", "bfloat16")}
    columns = ["batch 1 after 512 tokens", *(f"{dtype}, tokens/s" for dtype in found), "KV bytes a token, fp32"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = {dtype: {row["variant"]: row for row in facts["rows"]} for dtype, facts in found.items()}
    for name, text in DECODED.items():
        speeds = [f"{rows[dtype][name]['decode_tokens_per_s']:.2f}" for dtype in found]
        lines.append(f"| {text} | {' | '.join(speeds)} | {rows['float32'][name]['kv_bytes_per_token']:,} |")
    for of, to, text in DECODE_RATIOS:
        cells = [f"{rows[d][of]['decode_tokens_per_s'] / rows[d][to]['decode_tokens_per_s']:.2f}" for d in found]
        lines.append(f"| **{text}** | {' | '.join(cells)} | |")
    facts = found["float32"]
    where = f"The {facts['preset']} shape, random weights, {facts['device']}, {facts['threads']} threads"
    speed = f"a plain sum reads {facts['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    return "\n".join([*lines, "", f"{where}; {speed}."]) + "\n"


ON_GPU = [
    ("full_swiglu", "full-rank SwiGLU"),
    ("full_swiglu_compiled", "full-rank SwiGLU, torch.compile"),
    ("lowrank_relu2", "low-rank relu², no 2:4"),
    ("lowrank_relu2_compiled", "low-rank relu², no 2:4, torch.compile"),
    ("elas_compressed", "ELAS, `compressed`"),
    ("elas_fused", "ELAS, `fused`"),
]
GPU_RATIOS = [
    ("elas_fused", "lowrank_relu2", "fused ÷ low-rank relu²"),
    ("elas_fused", "lowrank_relu2_compiled", "fused ÷ the same, compiled"),
    ("elas_fused", "full_swiglu_compiled", "fused ÷ full-rank SwiGLU, compiled"),
    ("elas_compressed", "lowrank_relu2", "compressed ÷ low-rank relu²"),
    ("elas_compressed", "lowrank_relu2_compiled", "compressed ÷ the same, compiled"),
    ("elas_compressed", "full_swiglu_compiled", "compressed ÷ full-rank SwiGLU, compiled"),
]


def gpu_ffn() -> str:
    """The FFN on a GPU: milliseconds, share of its peak, what is saved, and ratios, one column a shape."""
    facts = read("gpu_ffn_h100")
    shapes = list(dict.fromkeys(row["shape"] for row in facts["rows"]))
    rows = {(row["shape"], row["variant"]): row for row in facts["rows"]}
    lines = [f"| forward + backward, ms (share of the peak; saved, MiB) | {' | '.join(shapes)} |"]
    lines.append("|---" * (len(shapes) + 1) + "|")
    for name, text in ON_GPU:
        cells = []
        for shape in shapes:
            row = rows[shape, name]
            time, saved = row["fwd_ms"] + row["bwd_ms"], row["saved_bytes"] / 2**20
            by = f", {row['implementation']}" if name == "elas_fused" else ""
            cells.append(f"{time:.2f} ({row['peak_share']:.0%}; {saved:,.0f}{by})")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    for of, to, text in GPU_RATIOS:
        cells = [f"{_both(rows[shape, of]) / _both(rows[shape, to]):.2f}" for shape in shapes]
        lines.append(f"| **{text}** | {' | '.join(cells)} |")
    where = f"{facts['device']}, torch {facts['torch']}, {facts['date']}; {facts['tokens']:,} tokens, bf16"
    return "\n".join([*lines, "", f"{where}; medians of {facts['repeats']} rounds in turns."]) + "\n"


def _both(row: dict) -> float:
    return row["fwd_ms"] + row["bwd_ms"]


def gpu_step() -> str:
    """A whole training step on a GPU."""
    facts = read("gpu_step_h100")
    lines = ["| | tokens/s | step, ms | share of the peak | peak memory, GiB |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        cells = [f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:.1f}", f"{row['peak_share']:.0%}"]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} | {row['peak_bytes'] / 2**30:.1f} |")
    where = f"{facts['preset']}, {facts['batch']} × {facts['seq']} tokens a step, bf16, {facts['device']}"
    return "\n".join([*lines, "", f"{where}, torch {facts['torch']}, {facts['date']}."]) + "\n"


def engines() -> str:
    """Exports in other engines, against transformers."""
    facts = read("engines")
    header = "| engine, form | version | same greedy tokens | largest difference of a log-probability |"
    lines = [header, "|---|---|---|---|"]
    for name, row in facts["rows"].items():
        same = "yes" if row["same_tokens"] else "no"
        lines.append(f"| {name} | {row['engine']} | {same} | {row['logprob_diff']:.1e} |")
    more = f"{facts['prompts']} prompts of {facts['new_tokens']} new tokens each, fp32, on a CPU."
    return "\n".join([*lines, "", more]) + "\n"


def spread(rows: list[dict]) -> tuple[float, float]:
    """Median perplexity, and the largest deviation from it as a share, of the rows of a rate study."""
    ppl = [row["ppl"] for row in rows]
    middle = statistics.median(ppl)
    return middle, max(abs(value / middle - 1) for value in ppl)


BLOCKS = {
    "against_full_rank": against_full_rank.table,
    "quickstart": quickstart,
    "quickstart_rates": quickstart_rates,
    "experiments": experiments,
    "megatron": megatron,
    "generate": generate,
    "engines": engines,
    "gpu_ffn": gpu_ffn,
    "gpu_step": gpu_step,
    "memory_account": memory.step_account,
    "memory_step_small": memory.step_small,
    "memory_step_large": memory.step_large,
    "micro_batch": memory.micro_batch,
    "report_speed": report.table,
    "metrics_cost": metrics_cost.table,
    "loss": memory.loss,
    "optimizer_rates": optimizer_tables.rates,
    "optimizer_long": optimizer_tables.long,
    "optimizer_twins": optimizer_tables.twins,
    "with_and_without": optimizer_tables.with_and_without,
    "optimizer_transfer": optimizer_tables.transfer,
    "optimizer_unscaled": optimizer_tables.unscaled,
    "optimizer_cost": optimizer_tables.cost,
    "rebalance": optimizer_tables.rebalance,
    "dry_run": memory.dry_run,
    "plan_check": plan.check,
    "plan_parameters": plan.parameters,
    "plan_activations": plan.activations,
    "plan_boost": plan.boost,
}


def rendered(text: str) -> str:
    """A page with its blocks made anew.

    Raises:
        KeyError: a block of an unknown name.
    """
    return _BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[4], text)


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is out of date")
    options = parser.parse_args()
    status = 0
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = rendered(old)
        if new == old:
            continue
        if options.check:
            print(f"error: {name} differs from its result files; python docs/experiments/pages.py", file=sys.stderr)
            status = 1
        else:
            page.write_text(new, encoding="utf-8")
            print(f"{name}: written")
    return status


if __name__ == "__main__":
    sys.exit(main())
