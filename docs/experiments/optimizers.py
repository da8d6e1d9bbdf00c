"""What a token teaches, by optimizer: `python docs/experiments/optimizers.py rates`, then three_million, then twins.

Trains the models of docs/experiments/base.yaml under AdamW, LORO, Muon and Spectron on the source of Python's
standard library, and writes docs/experiments/results/optimizers.json, which docs/results.md shows. A finished run is
not repeated; one that was cut off resumes. One rank a run, several runs side by side: losses do not depend on the
layout.

- `rates`: every optimizer at four rates or more, 614k tokens, one seed.
- `three_million`: every optimizer at its best rate, 3.07 M tokens, three seeds.
- `twins`: ELAS and the same without 2:4 under each optimizer, 3.07 M tokens, three seeds.
- `transfer`: Muon's and Spectron's rates at widths 128, 256 and 512 and at ranks h/8, h/4 and h/2.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from elas.checkpoint.identity import versions
from elas.config import load_config
from elas.data_prep.sources import stdlib_corpus
from elas.quickstart import prepare

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "optimizers.json"
SWIGLU = {"model.activation": "swiglu", "model.ffn_hidden_size": 684, "sparsity.kind": "none"}
MODELS = {
    "elas": {},
    "lowrank_relu2": {"sparsity.kind": "none"},
    "lowrank_swiglu": SWIGLU,
    "full_swiglu": {"low_rank.kind": "none", **SWIGLU},
}
LORO = {"kind": "loro", "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0}
OPTIMIZERS = {
    "adamw": {},
    "loro": {f"optimizer.{key}": value for key, value in LORO.items()} | {"schedule.kind": "cosine_restart"},
    "muon": {"optimizer.kind": "muon"},
    "spectron": {"optimizer.kind": "muon", "optimizer.normalize": "spectron"},
}
RATES = {
    "adamw": [(rate, None) for rate in (0.00075, 0.0015, 0.003, 0.005)],
    "loro": [(rate, None) for rate in (0.0015, 0.003, 0.006, 0.012)],
    "muon": [(0.003, 0.0015), (0.0045, 0.003), (0.006, 0.003), (0.006, 0.0045), (0.009, 0.004), (0.012, 0.005)],
    "spectron": [
        (0.0125, 0.0015),
        (0.0175, 0.003),
        (0.025, 0.0015),
        (0.025, 0.003),
        (0.05, 0.003),
        (0.08, 0.004),
        (0.12, 0.005),
    ],
}
"""Rates, and of what is no matrix."""
TRANSFERRED = {
    "muon": [(0.0045, 0.003), (0.006, 0.003), (0.003, 0.003), (0.009, 0.003)],
    "spectron": [(0.025, 0.003), (0.0375, 0.003), (0.0175, 0.003)],
}
SHORT, LONG, SEEDS = 300, 1500, (1, 2, 3)


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    optimizer: str
    lr: float
    lr_other: float | None
    steps: int
    seed: int
    width: int = 256
    rank: int = 64

    @property
    def name(self) -> str:
        """Of its folder."""
        name = f"{self.model}_{self.optimizer}_{self.lr:g}_{self.lr_other or 0:g}_{self.steps}_{self.seed}"
        return name if (self.width, self.rank) == (256, 64) else f"{name}_{self.width}_{self.rank}"

    def settings(self) -> dict:
        """What it changes in base.yaml."""
        found = {"optimizer.lr": self.lr, "train.steps": self.steps, "train.seed": self.seed}
        found |= {"model.hidden_size": self.width, "low_rank.rank": self.rank, "model.ffn_hidden_size": 4 * self.width}
        found |= {"model.num_attention_heads": self.width // 64}
        found |= {"schedule.warmup_steps": 0.1, "sparsity.dense_steps": 0.1, "log.pairs_every_steps": 100}
        found |= {**MODELS[self.model], **OPTIMIZERS[self.optimizer]}
        found["train.eval_every"] = found["checkpoint.every_steps"] = self.steps // (3 if self.steps == SHORT else 6)
        if found.get("sparsity.kind") == "none":
            del found["sparsity.dense_steps"]
        if self.lr_other is not None:
            found["optimizer.lr_other"] = self.lr_other
        if self.optimizer == "loro":
            found["optimizer.exact_every"] = self.steps // 10
        return found


def main() -> int:
    """Run what is missing of a study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], help="optimizers")
    parser.add_argument("--together", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    options = parser.parse_args()
    runs = [run for run in STUDIES[options.study]() if run.optimizer in options.only]
    prepare(options.workdir, load_config("quickstart"), stdlib_corpus())
    with ThreadPoolExecutor(options.together) as pool:
        done = list(pool.map(lambda run: train(options.workdir, run), runs))
    failed = [run.name for run, row in zip(runs, done, strict=True) if row is None]
    if failed:
        print(f"error: not finished: {', '.join(failed)}; their output is above", file=sys.stderr)
    return 1 if failed else 0


def rates() -> list[Run]:
    """Every optimizer at its rates, on the models that it is compared on."""
    pairs = [("elas", optimizer) for optimizer in ("muon", "adamw", "spectron", "loro")]
    pairs += [(model, optimizer) for model in ("full_swiglu", "lowrank_swiglu") for optimizer in ("muon", "adamw")]
    return [Run(model, name, *rate, SHORT, 1) for model, name in pairs for rate in RATES[name]]


def three_million() -> list[Run]:
    """Each pair of `rates` at its best rate."""
    pairs = dict.fromkeys((run.model, run.optimizer) for run in rates())
    return [Run(*pair, *best(*pair), LONG, seed) for pair in pairs for seed in SEEDS]


def twins() -> list[Run]:
    """ELAS without 2:4, at the rates of ELAS."""
    return [Run("lowrank_relu2", name, *best("elas", name), LONG, seed) for name in OPTIMIZERS for seed in SEEDS]


def transfer() -> list[Run]:
    """Other widths and ranks."""
    sizes = [(512, 128), (128, 32), (256, 64), (256, 32), (256, 128)]
    return [
        Run("elas", name, *rate, SHORT, 1, *size)
        for name, rates in TRANSFERRED.items()
        for size in sizes
        for rate in rates
    ]


STUDIES = {"rates": rates, "three_million": three_million, "twins": twins, "transfer": transfer}


def best(model: str, optimizer: str) -> tuple[float, float | None]:
    """The rates with the lowest perplexity in `rates`."""
    wanted = {"model": model, "optimizer": optimizer, "steps": SHORT, "width": 256, "rank": 64}
    found = [row for row in rows() if {key: row[key] for key in wanted} == wanted]
    if not found:
        raise SystemExit(f"error: no result of {optimizer} on {model}; run `rates` first")
    chosen = min(found, key=lambda row: row["ppl"])
    return chosen["lr"], chosen["lr_other"]


def rows() -> list[dict]:
    """Results so far."""
    with LOCK:  # while another run's are written
        return json.loads(RESULT.read_text()) if RESULT.exists() else []


def train(workdir: Path, run: Run) -> dict | None:
    """One run to its end, and its result into the file; None if it failed."""
    key = asdict(run)
    for row in rows():
        if {name: row[name] for name in key} == key:
            return row
    folder = workdir / run.name
    done = run_train(workdir, run, folder, {})
    if done.returncode:
        print(f"{run.name}\n{done.stderr}", file=sys.stderr)
        return None
    metrics, validation = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "validation"))
    last = metrics[-1]
    if last["step"] < run.steps:  # asked to stop; the next start resumes it
        return None
    steps = [row["step_s"] for row in metrics[1:]]
    row = {
        **key,
        "tokens": last["tokens"],
        "ppl": validation[-1]["ppl"],
        "sparsity": last.get("sparsity"),
        "dropped": last.get("dropped"),
        "validation": [[one["step"], round(one["ppl"], 3)] for one in validation],
        "step_s": sorted(steps)[len(steps) // 2],
        "optimizer_s": sorted(one.get("optimizer_s", 0.0) for one in metrics)[len(metrics) // 2] or None,
        **{name: last.get(name) for name in ("pair_condition", "pair_norm_ratio", "effective_rank")},
        "versions": versions(),
    }
    print(f"{run.name:<40} perplexity {row['ppl']:.2f}", flush=True)
    with LOCK:
        found = sorted([*rows(), row], key=lambda one: [str(one[name]) for name in key])
        RESULT.write_text("[\n" + ",\n".join(json.dumps(one) for one in found) + "\n]\n")
    return row


def run_train(
    workdir: Path, run: Run, folder: Path, changes: dict, program: tuple[str, ...] = ("-m", "elas.cli", "train")
) -> subprocess.CompletedProcess[str]:
    """`elas train` of a run on one core, into `folder`."""
    command = [
        sys.executable, *program, "--config", str(HERE / "base.yaml"),
        "--data.train", f"{workdir}/tokens/train", "--data.valid", f"{workdir}/tokens/valid",
        "--data.tokenizer", f"{workdir}/tokenizer", "--train.run_dir", str(folder),
        *(word for name, value in {**run.settings(), **changes}.items() for word in (f"--{name}", str(value))),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LOCK = threading.RLock()

if __name__ == "__main__":
    sys.exit(main())
