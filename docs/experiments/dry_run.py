"""The memory that `elas train --dry-run` estimates, beside that of runs: `python docs/experiments/dry_run.py`.

Two training steps of one rank on a CPU, one thread; the largest resident set of the process, as it is and with glibc
set to return what is freed. Writes docs/experiments/results/dry_run.json, which docs/memory.md shows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from elas.checkpoint.identity import versions
from elas.config import load_config
from elas.data_prep.sources import stdlib_corpus
from elas.quickstart import prepare

RESULT = Path(__file__).resolve().parent / "results" / "dry_run.json"
TINY = {"model.hidden_size": 64, "model.num_layers": 2, "model.ffn_hidden_size": 256, "low_rank.rank": 16}
MIDDLE = {"model.hidden_size": 512, "model.num_layers": 8, "model.num_attention_heads": 8, "low_rank.rank": 128}
CASES = {
    "2 layers × 64, rank 16": {**TINY, "train.micro_batch_size": 1},
    "quickstart: 4 × 256, rank 64": {"train.micro_batch_size": 4},
    "quickstart in bfloat16": {"train.dtype": "bfloat16", "train.micro_batch_size": 8},
    "8 layers × 512, rank 128, recompute none": {**MIDDLE, "train.micro_batch_size": 16, "train.recompute": "none"},
    "8 layers × 512, rank 128": {**MIDDLE, "train.micro_batch_size": 16, "model.ffn_hidden_size": 2048},
}
STEPS = {"train.steps": 2, "sparsity.dense_steps": 0, "schedule.warmup_steps": 0, "parallel.zero": 0,
         "train.eval_batches": 0}  # fmt: skip


def main() -> int:
    """Measure every case."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, load_config("quickstart"), stdlib_corpus())
        for case, settings in CASES.items():
            rows.append({"case": case, **measure(folder, settings)})
            print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")
    return 0


def measure(folder: Path, settings: dict) -> dict:
    """Estimated and largest resident bytes."""
    given = {**STEPS, **settings, "train.global_batch_size": settings["train.micro_batch_size"]}
    given |= {"data.train": f"{folder}/tokens/train", "data.valid": f"{folder}/tokens/valid"}
    given |= {"data.tokenizer": f"{folder}/tokenizer", "train.run_dir": f"{folder}/run"}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "elas.cli", "train", "--config", "quickstart", *words]
    facts = folder / "facts.json"
    subprocess.run([*command, "--dry-run", "--json", str(facts)], check=True, stdout=subprocess.DEVNULL)
    found = {"batch": settings["train.micro_batch_size"]}
    found["estimated"] = json.loads(facts.read_text())["memory_bytes"]
    for name, more in (("measured", {}), ("returning", {"MALLOC_MMAP_THRESHOLD_": str(2**20)})):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"error: {' '.join(command)}: status {status}")
        found[name] = 1024 * used.ru_maxrss
        shutil.rmtree(folder / "run")
    return found


if __name__ == "__main__":
    sys.exit(main())
