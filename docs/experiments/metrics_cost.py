"""What the metrics of a run cost: `python docs/experiments/metrics_cost.py` writes results/metrics_cost.json.

In one process, steps without metrics, logged steps (counts of zeros and dropped values, the row, metrics.jsonl,
TensorBoard) and logged steps that also measure all factor pairs take turns. At the defaults every tenth step is logged
and every 500th measures pairs, by which their extra time is divided.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from elas.accelerator import processor
from elas.bench.one_process import one_process
from elas.config import load_config
from elas.config.rules import validate
from elas.engine import balance
from elas.engine.engine import Engine
from elas.model import observe
from elas.model.activation import set_sparse
from elas.train.metrics import Metrics
from elas.train.step_log import StepLog
from elas.train.throughput import Goodput
from elas.train.trackers import open_trackers

RESULT = Path(__file__).resolve().parent / "results" / "metrics_cost.json"
ROUNDS = 25
KINDS = ("without", "logged", "pairs")
CASES = {"quickstart": {}, "60m, 2 layers": {"model.num_layers": 2, "train.micro_batch_size": 8}}


def main() -> int:
    """Measure each case."""
    rows = []
    for name, changes in CASES.items():
        with tempfile.TemporaryDirectory() as folder, one_process() as layout:
            given = {
                "train.run_dir": folder,
                "optimizer.lr": 1e-4,
                "parallel.zero": 0,
                "sparsity.dense_steps": 0,
                **changes,
            }
            preset = name.partition(",")[0]
            size = changes.get("train.micro_batch_size", 4)
            config = load_config(preset, {**given, "train.micro_batch_size": size, "train.global_batch_size": 2 * size})
            validate(config, 1)
            rows.append({"case": name, **measure(config, layout)})
            print(json.dumps(rows[-1]), flush=True)
    facts = {"rounds": ROUNDS, "threads": torch.get_num_threads(), "cpu": processor(), "rows": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def measure(config, layout) -> dict:
    """Median seconds of each kind of step, and the share that metrics cost at the settings' defaults."""
    engine, log = Engine(config, layout), StepLog(config, layout, Goodput(None))
    set_sparse(engine.chunks, True)
    engine.set_learning_rate(config.optimizer.lr)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens = 0
    with Metrics(config.train.run_dir, open_trackers(config, 0, print), last_step=0, writes=True) as metrics:
        for turn in range(ROUNDS + 1):
            for number in range(len(KINDS)):
                kind = KINDS[(turn + number) % len(KINDS)]
                batches = iter(_batches(config, engine.micro_batches))
                begun = time.perf_counter()
                observe.look_next(engine.chunks, 0 if kind == "without" else config.log.sparsity_tokens)
                loss, norm = engine.step(batches, lambda: [])
                tokens += engine.labels
                log.interval.losses.append(loss)
                if kind != "without":
                    more = balance.measure(engine) if kind == "pairs" else {}
                    step = 3 * turn + number + 1
                    values = {"step": step, "tokens": tokens, "loss": loss, "grad_norm": norm, "lr": 1e-4, **more}
                    metrics.log("metrics", log.row(engine, values))
                if turn:  # the first round warms up
                    seconds[kind].append(time.perf_counter() - begun)
    found = {kind: statistics.median(times) for kind, times in seconds.items()}
    logged, pairs = found["logged"] - found["without"], found["pairs"] - found["logged"]
    extra = logged / config.log.every_steps + pairs / config.log.pairs_every_steps
    return {"seconds": found, "share": extra / found["without"]}


def _batches(config, micro_batches: int) -> list:
    shape = (config.train.micro_batch_size, config.model.seq_length + 1)
    made = [torch.randint(config.model.vocab_size, shape) for _ in range(micro_batches)]
    return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in made]


def table() -> str:
    """The figures, for docs/metrics.md."""
    facts = json.loads(RESULT.read_text())
    lines = ["| | step, s | logged step | with factor pairs | cost at the defaults |", "|---" * 5 + "|"]
    for row in facts["rows"]:
        cells = " | ".join(f"{row['seconds'][kind]:.3f}" for kind in KINDS)
        lines.append(f"| {row['case']} | {cells} | {row['share']:.2%} |")
    where = f"Medians of {facts['rounds']} rounds in turns on {facts['cpu']}, {facts['threads']} threads."
    return "\n".join([*lines, "", where]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
