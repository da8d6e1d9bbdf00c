"""What Muon's steps of matrices cost: `python docs/experiments/muon_cost.py --workdir DIR`.

Trains the `60m` preset at its own global batch for a few steps, on one process and on TP2 × DP2 with ZeRO 1, and reads
`step_s`, `optimizer_s` and `optimizer_bytes` from metrics.jsonl, into docs/experiments/results/muon_cost.json. DIR is
that of docs/experiments/optimizers.py, with tokens; the text does not matter.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from elas.accelerator import processor
from elas.checkpoint.identity import versions

RESULT = Path(__file__).resolve().parent / "results" / "muon_cost.json"
STEPS = 3
LAYOUTS = {
    "one process": (1, {}),
    "TP2 × DP2, ZeRO 1": (4, {"parallel.tensor": 2, "parallel.zero": 1}),
}


def main() -> int:
    """Train on every layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), help="default: %(default)s")
    options = parser.parse_args()
    rows = []
    for name, (ranks, parallel) in LAYOUTS.items():
        rows.append({"layout": name, "ranks": ranks, **_run(options.workdir, ranks, parallel)})
        print(json.dumps(rows[-1]), flush=True)
    facts = {"preset": "60m", "cores": len(os.sched_getaffinity(0)), "cpu": processor(), "rows": rows}
    RESULT.write_text(json.dumps({**facts, "versions": versions()}, indent=1) + "\n")
    return 0


def _run(workdir: Path, ranks: int, parallel: dict) -> dict:
    folder = workdir / "cost"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "data.train": f"{workdir}/tokens/train", "data.valid": f"{workdir}/tokens/valid", "train.run_dir": str(folder),
        "train.steps": STEPS, "schedule.warmup_steps": 1, "sparsity.dense_steps": 0, "log.every_steps": 1,
        "train.eval_every": STEPS, "train.eval_batches": 1, "checkpoint.every_steps": STEPS, **parallel,
    }  # fmt: skip
    launch = ["train"] if ranks == 1 else ["launch", "local", "--ranks", str(ranks)]
    command = [sys.executable, "-m", "elas.cli", *launch, "--config", "60m"]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL, check=True)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][
        1:
    ]  # the first warms up
    names = ("step_s", "optimizer_s", "optimizer_bytes")
    return {name: statistics.median(row[name] for row in logged) for name in names} | {
        "share": statistics.median(row["optimizer_s"] / row["step_s"] for row in logged)
    }


if __name__ == "__main__":
    sys.exit(main())
