"""Seconds a step of each model under each optimizer: `python docs/experiments/optimizer_pace.py --workdir DIR`.

The runs of docs/experiments/optimizers.py went side by side with other work, so their times say little. Here short runs
of the same settings take turns, alone on one core, and docs/experiments/results/optimizer_pace.json gets the medians.
DIR is that study's, with tokenizer and tokens.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from optimizers import Run, best, run_train, three_million

from elas.accelerator import processor
from elas.checkpoint.identity import versions

RESULT = Path(__file__).resolve().parent / "results" / "optimizer_pace.json"
STEPS, WARM, ROUNDS = 30, 6, 3


def main() -> int:
    """Measure every pair of model and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), help="default: %(default)s")
    options = parser.parse_args()
    pairs = list(dict.fromkeys((run.model, run.optimizer) for run in three_million()))
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for turn in range(ROUNDS):
        for pair in pairs:
            times[pair].append(_median(options.workdir, Run(*pair, *best(*pair), STEPS, seed=100 + turn)))
            print(f"{' '.join(pair):<24} {times[pair][-1]:.3f} s a step", flush=True)
    rows = [
        {"model": model, "optimizer": optimizer, "step_s": statistics.median(found), "rounds": found}
        for (model, optimizer), found in times.items()
    ]
    facts = {"cpu": processor(), "threads": 1, "steps": STEPS, "rows": rows, "versions": versions()}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def _median(workdir: Path, run: Run) -> float:
    """Median step with 2:4 where it is used, of one run."""
    folder = workdir / "pace"
    shutil.rmtree(folder, ignore_errors=True)
    changes = {"sparsity.dense_steps": 0} if run.model == "elas" else {}
    changes |= {"log.every_steps": 2, "log.pairs_every_steps": 10**6, "train.eval_every": STEPS}
    done = run_train(workdir, run, folder, changes)
    if done.returncode:
        raise SystemExit(f"error: {run.name}: {done.stderr}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["step_s"] for row in rows if row["step"] > WARM)


if __name__ == "__main__":
    sys.exit(main())
