"""Run experiments one by one and write what came out: `python docs/experiments/run.py NAME …` (no name: all of them).

Works in the repository's root. Makes the corpus as `elas quickstart` does, then runs `elas train --config
docs/experiments/NAME.yaml` for each: base.yaml with what NAME.yaml changes. A run that was cut off goes on; a finished
one is not run again. Results, with their curves, go to docs/experiments/results/NAME.json; `--table` prints them and
draws docs/figures/experiments.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from elas.checkpoint.identity import versions
from elas.config import Config, flatten, load_config
from elas.data_prep.sources import stdlib_corpus
from elas.errors import UserError
from elas.quickstart import prepare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NEEDED = ("changes", "steps", "tokens", "loss", "ppl", "sparsity", "dropped", "validation")


def main() -> int:
    """Run the experiments named on the command line, or print the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="YAML files here, without .yaml (default: all)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of a run")
    parser.add_argument("--table", action="store_true", help="print results, draw those of full length, run nothing")
    options = parser.parse_args()
    names = experiments()
    for name in options.names:
        if name not in names:
            parser.error(f"no experiment {name}; there are {', '.join(names)}")
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: give 1 or more")
    if options.table:
        results = read_results(options.names or names)
        print(table(results))
        if results and not options.names:
            print(f"curves: {plot(results, HERE.parent / 'figures' / 'experiments.png')}")
        return 0
    os.chdir(HERE.parents[1])  # the paths in the YAML files begin there
    make_corpus()
    failed = [name for name in options.names or names if not run(name, options.threads)]
    if failed:
        print(f"error: not finished: {', '.join(failed)}; what they said is above", file=sys.stderr)
    return 1 if failed else 0


def experiments() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "base")


def make_corpus() -> None:
    """The quickstart's tokenizer and tokens, in the folder quickstart, unless they are there."""
    prepare(Path("quickstart"), load_config("quickstart"), stdlib_corpus())


def run(name: str, threads: int) -> bool:
    """Train one experiment to its end and write its result; whether it came to that."""
    source = HERE / f"{name}.yaml"
    print(f"● {name}", flush=True)
    try:
        config = load_config(str(source))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    folder = Path(config.train.run_dir)
    changed = changed_since(folder, config)
    if changed:
        print(f"error: {folder} holds a run with other {', '.join(changed)}; move it away", file=sys.stderr)
        return False
    command = [sys.executable, "-m", "elas.cli", "train", "--config", str(source)]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode:
        return False
    metrics, validation = read(folder / "metrics.jsonl"), read(folder / "validation.jsonl")
    last = metrics[-1]
    said = yaml.safe_load(source.read_text())
    changes = flatten({section: values for section, values in said.items() if section != "base"})
    changes.pop("train.run_dir", None)
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
        "threads": threads,
        "versions": versions(),
        "validation": [[row["step"], round(row["loss"], 5)] for row in validation],
        "training": [[row["step"], round(row["loss"], 4)] for row in metrics[::5]],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    return True


def changed_since(folder: Path, config: Config) -> list[str]:
    """Settings that a run begun in the folder had otherwise; the ZeRO stage is settled by the run itself."""
    if not (folder / "config.json").exists():
        return []
    then = flatten(json.loads((folder / "config.json").read_text()))
    now = flatten(config.to_dict())
    return [key for key, value in now.items() if key in then and then[key] != value and key != "parallel.zero"]


def read(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(names: list[str]) -> dict[str, dict]:
    """Results by experiment, the best first; a file that is none is named and left out."""
    results = {}
    for name in names:
        path = RESULTS / f"{name}.json"
        try:
            row = json.loads(path.read_text())
            results[name] = {key: row[key] for key in NEEDED}
        except FileNotFoundError:
            print(f"note: no result of {name} yet", file=sys.stderr)
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path} is no result; run {name} again", file=sys.stderr)
    return dict(sorted(results.items(), key=lambda item: item[1]["loss"]))


def table(results: dict[str, dict]) -> str:
    """A Markdown table."""
    lines = ["| experiment | changes | tokens | validation perplexity | zeros | dropped |", "|---|---|---|---|---|---|"]
    for name, row in results.items():
        changes = ", ".join(f"`{key}={value}`" for key, value in row["changes"].items()) or "–"
        shares = " | ".join(f"{row[key]:.1%}" if row[key] else "–" for key in ("sparsity", "dropped"))
        lines.append(f"| {name} | {changes} | {row['tokens']:,} | {row['ppl']:.2f} | {shares} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], target: Path) -> Path:
    """Draw validation loss over tokens of the results that took as many tokens as most did."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    length = statistics.mode(row["tokens"] for row in results.values())
    colors = iter(plt.colormaps["tab20"].colors)
    for name, row in results.items():
        if row["tokens"] != length:
            continue
        per_step = row["tokens"] / row["steps"] / 1e6
        steps, losses = zip(*row["validation"][1:])
        axes.plot([step * per_step for step in steps], losses, "o-", ms=3, lw=1.2, color=next(colors),
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
