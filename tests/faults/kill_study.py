"""Kill a random rank at random moments, start again, compare with a run never killed.

`python tests/faults/kill_study.py` is the study behind a line of docs/fault-tolerance.md; the suite runs samples of it.
Checkpoints are written every few steps, beside training, so many of the kills fall into a save.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.corpora import SMALL, write_corpus
from support.training_processes import curve, finish, rows, start

TIMEOUT = 10.0


def main() -> int:
    """Run the study; 0 when every kill was followed by a resume and the curves are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=2)
    options = parser.parse_args()
    moments = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="elas-kills-") as name:
        folder = Path(name)
        settings = {
            **SMALL, "data.train": write_corpus(folder / "text"), "data.split": "90,10,0",
            "parallel.zero": options.zero, "train.steps": options.steps,
            "checkpoint.every_steps": 4, "checkpoint.async_save": True, "train.timeout_seconds": TIMEOUT,
        }  # fmt: skip
        finish(start({**settings, "train.run_dir": folder / "whole"}, options.ranks))
        killed = folder / "killed"
        saving = resumed = slowest = 0
        for number in range(options.kills):
            begun = time.time()
            ranks = start({**settings, "train.run_dir": killed}, options.ranks)
            metrics = killed / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_mtime > begun):
                assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.5))
            victim = moments.randrange(options.ranks)
            saving += bool(list(killed.glob("checkpoints/*.partial")))
            ranks[victim].kill()
            since = time.monotonic()
            outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
            took = time.monotonic() - since
            slowest = max(slowest, took)
            resumed += number > 0 and any("resumed from" in output for output in outputs)
            step = rows(killed)[-1]["step"]
            print(f"kill {number + 1:>2}: rank {victim}, step {step}, the others ended in {took:.1f} s", flush=True)
        last = finish(start({**settings, "train.run_dir": killed}, options.ranks))
        resumed += "resumed from" in last
        same = curve(killed) == curve(folder / "whole") and len(curve(killed)) == options.steps
        print(f"{options.kills} kills, {saving} during a save; {resumed} starts went on from a checkpoint; the others "
              f"ended within {slowest:.1f} s; curves {'identical' if same else 'DIFFERENT'}")  # fmt: skip
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
