"""Is the quickstart's learning rate stable? `python docs/experiments/quickstart.py --rates 0.0015 0.003 --seeds 1 2 3`

Trains the quickstart preset for every rate, seed and corpus asked for, and writes what came out to
docs/experiments/results/quickstart_rates.json, which docs/results.md shows. The corpora are what `elas quickstart`
reads (`stdlib`) and the same without its 20 largest files (`stdlib_less_20`). A finished run is not repeated; one that
was cut off resumes. One rank a run, several runs side by side: the losses do not depend on the layout.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from elas.checkpoint.identity import versions
from elas.config import load_config
from elas.data_prep.sources import Corpus, stdlib_corpus
from elas.quickstart import prepare, settings_of

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "quickstart_rates.json"
CORPORA = ("stdlib", "stdlib_less_20")
LEFT_OUT = 20


def main() -> int:
    """Run what is missing, then write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", help="default: the preset's; lr_other in proportion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: %(default)s")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), help="default: both")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart_rates"), help="default: %(default)s")
    parser.add_argument("--together", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    options = parser.parse_args()
    rates = options.rates or [load_config("quickstart").optimizer.lr]
    for corpus in options.corpora:
        _prepare(options.workdir / corpus, corpus)
    tasks = [(corpus, rate, seed) for seed in options.seeds for corpus in options.corpora for rate in rates]
    with ThreadPoolExecutor(options.together) as pool:
        rows = list(pool.map(lambda task: train(options.workdir, *task), tasks))
    if None in rows:
        print("error: not every run came to its end; their output is above", file=sys.stderr)
        return 1
    write(rows)
    return 0


def _prepare(folder: Path, name: str) -> None:
    """Tokenizer and tokens of a corpus, unless they are there."""
    corpus = stdlib_corpus()
    if name == "stdlib_less_20":
        small = folder / "text"
        for file in sorted(corpus.files, key=lambda file: -file.size)[LEFT_OUT:]:
            target = small / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, target)
        corpus = Corpus([small])
    prepare(folder, load_config("quickstart"), corpus)


def train(workdir: Path, corpus: str, rate: float, seed: int) -> dict | None:
    """One run to its end; its facts, or None when it failed."""
    data, run = workdir / corpus, workdir / corpus / f"lr{rate:g}_seed{seed}"
    preset = load_config("quickstart").optimizer
    other = rate * (preset.lr_other or preset.lr) / preset.lr
    command = [
        sys.executable, "-m", "elas.cli", "train", "--config", "quickstart", "--data.train", f"{data}/tokens/train",
        "--data.valid", f"{data}/tokens/valid", "--data.tokenizer", f"{data}/tokenizer", "--train.run_dir", str(run),
        "--optimizer.lr", f"{rate:g}", "--optimizer.lr_other", f"{other:g}", "--train.seed", str(seed),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode:
        return None
    metrics, validation = ((run / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "validation"))
    last, final = json.loads(metrics[-1]), json.loads(validation[-1])
    row = {"corpus": corpus, "lr": rate, "seed": seed, "tokens": last["tokens"], "ppl": final["ppl"],
           "sparsity": last["sparsity"], "dropped": last["dropped"], "versions": versions()}  # fmt: skip
    print(f"{corpus:<15} lr {rate:<7g} seed {seed}  perplexity {final['ppl']:.2f}", flush=True)
    return row


def write(rows: list[dict]) -> None:
    """Add rows to the result file, in place of those of the same run and of those of another preset."""
    settings = settings_of(load_config("quickstart"))
    old = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    before = old["rows"] if old.get("settings") == settings else []
    kept = {(row["corpus"], row["lr"], row["seed"]): row for row in [*before, *rows]}
    facts = {"settings": settings, "rows": [kept[key] for key in sorted(kept)]}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
