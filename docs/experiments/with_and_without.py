"""What 2:4 takes from trained weights: `python docs/experiments/with_and_without.py --workdir DIR`.

The finished long runs of docs/experiments/optimizers.py in DIR, of ELAS and of the same without 2:4, are exported and
evaluated twice each, with 2:4 and without, on the whole held-out set. Into results/with_and_without.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from optimizers import LONG, rows

from elas.checkpoint.identity import versions

RESULT = Path(__file__).resolve().parent / "results" / "with_and_without.json"
MODELS, KINDS = ("elas", "lowrank_relu2"), ("2:4", "none")


def main() -> int:
    """Evaluate every finished run that is still in DIR."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), help="default: %(default)s")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for row in rows():
        key = {name: row[name] for name in ("model", "optimizer", "seed")}
        rate = f"{row['lr']:g}_{row['lr_other'] or 0:g}"
        folder = options.workdir / f"{row['model']}_{row['optimizer']}_{rate}_{LONG}_{row['seed']}"
        known = any({name: one[name] for name in key} == key for one in found)
        if row["model"] not in MODELS or row["steps"] != LONG or known or not folder.exists():
            continue
        found.append(key | _evaluated(folder, options.workdir))
        print(found[-1], flush=True)
        RESULT.write_text(json.dumps({"rows": found, "versions": versions()}, indent=1) + "\n")
    return 0


def _evaluated(run: Path, workdir: Path) -> dict:
    """Perplexity of a run's weights with 2:4 and without."""
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(temporary) / "hf"
        _elas("export", "hf", "--checkpoint", run, "--out", exported)
        settings, found = exported / "config.json", {}
        for kind in KINDS:
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sparsity": kind}))
            result = Path(temporary) / "result.json"
            _elas("eval", "--checkpoint", exported, "--data", workdir / "tokens" / "valid",
                  "--tokenizer", workdir / "tokenizer", "--json", result)  # fmt: skip
            found[kind] = json.loads(result.read_text())["ppl"]
    return {"with_2_4": found["2:4"], "without": found["none"]}


def _elas(*words: object) -> None:
    command = [sys.executable, "-m", "elas.cli", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
