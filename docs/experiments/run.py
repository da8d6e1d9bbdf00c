"""Run experiments one by one and write what came out: `python docs/experiments/run.py NAME …` (no name: all of them).

Makes the corpus as `elas quickstart` does, then `elas train --config docs/experiments/NAME.yaml` for each: base.yaml
with what NAME.yaml changes. A run that was cut off goes on; a finished one is not run again. Results, with their
curves, go to docs/experiments/results/NAME.json; `--table` prints them and draws docs/figures/experiments.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from elas.config import flatten, load_config
from elas.quickstart import prepare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> int:
    """Run the experiments named on the command line, or print the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="YAML files here, without .yaml (default: all)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of a run")
    parser.add_argument("--table", action="store_true", help="print and draw what results there are, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table())
        print(f"curves: {plot(HERE.parent / 'figures' / 'experiments.png')}")
        return 0
    names = experiments()
    for name in options.names:
        if name not in names:
            parser.error(f"no experiment {name}; there are {', '.join(names)}")
    make_corpus()
    for name in options.names or names:
        run(name, options.threads)
    return 0


def experiments() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "base")


def make_corpus() -> None:
    """The quickstart's tokenizer and tokens, in the folder quickstart, unless they are there."""
    prepare(Path("quickstart"), load_config("quickstart"))


def run(name: str, threads: int) -> None:
    """Train one experiment to its end and write its result."""
    source = HERE / f"{name}.yaml"
    print(f"● {name}", flush=True)
    command = [sys.executable, "-m", "elas.cli", "train", "--config", str(source)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    folder = Path(load_config(str(source)).train.run_dir)
    metrics, validation = read(folder / "metrics.jsonl"), read(folder / "validation.jsonl")
    last = metrics[-1]
    said = yaml.safe_load(source.read_text())
    changes = flatten({section: values for section, values in said.items() if section not in ("base", "train")})
    exact = [row["exact_s"] for row in metrics if "exact_s" in row]
    result = {
        "changes": changes,
        "steps": last["step"],
        "tokens": last["tokens"],
        "loss": validation[-1]["loss"],
        "ppl": validation[-1]["ppl"],
        "sparsity": last["sparsity"],
        "dropped": last["dropped"],
        "step_s": statistics.median(row["step_s"] for row in metrics),
        "exact_s": statistics.median(exact) if exact else None,
        "validation": [[row["step"], round(row["loss"], 5)] for row in validation],
        "training": [[row["step"], round(row["loss"], 4)] for row in metrics[::5]],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")


def read(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table() -> str:
    """A Markdown table of what results there are, best first."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    lines = ["| experiment | changes | validation perplexity | zeros | dropped |", "|---|---|---|---|---|"]
    for name, row in sorted(results.items(), key=lambda item: item[1]["loss"]):
        changes = ", ".join(f"`{key}={value}`" for key, value in row["changes"].items()) or "–"
        shares = (f"{row[key]:.1%}" if row[key] else "–" for key in ("sparsity", "dropped"))
        lines.append(f"| {name} | {changes} | {row['ppl']:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def plot(target: Path) -> Path:
    """Draw validation loss over tokens of every result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    colors = plt.colormaps["tab20"].colors
    for color, (name, row) in zip(colors, sorted(results.items(), key=lambda item: item[1]["loss"])):
        per_step = row["tokens"] / row["steps"] / 1e6
        steps, losses = zip(*row["validation"][1:])
        axes.plot([step * per_step for step in steps], losses, "o-", ms=3, lw=1.2, color=color,
                  label=f"{name}  {row['ppl']:.1f}")  # fmt: skip
    axes.set(xlabel="tokens (million)", ylabel="validation loss (nats a token)")
    axes.legend(frameon=False, fontsize=8, title="final perplexity", title_fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


if __name__ == "__main__":
    sys.exit(main())
