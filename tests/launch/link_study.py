"""Tensor parallelism over a slow link between two hosts: bottleneck collectives against full rank.

`python tests/launch/link_study.py` measures whole training steps of the 60m shape with AdamW; the suite runs a smaller
one. Bytes are the network card's own count and do not depend on the machine; seconds stand beside them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from lab import Lab, Ssh  # noqa: E402

SHAPE = {
    "parallel.tensor": 2,
    "train.dtype": "float32",
    "train.micro_batch_size": 4,
    "train.global_batch_size": 4,
    "model.seq_length": 256,
    "model.vocab_size": 8192,
    "sparsity.dense_steps": 0,
    "optimizer.kind": "adamw",  # Muon moves matrices between ranks as well, once for a whole global batch
    "optimizer.lr": 1e-4,
}
SCRIPT = Path(__file__).with_name("link_steps.py")


def measure(lab: Lab, folder: Path, presets: tuple[str, str], overrides: dict, steps: int) -> list[dict]:
    """Rows of `link_steps.py`, one rank on each of two hosts, tensor parallel between them."""
    target, command = folder / "rows.json", [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    ranks = []
    for rank, host in enumerate(lab.nodes):
        where = [f"--node_rank={rank}", f"--master_addr={lab.nodes[0].address}", "--master_port=29531"]
        script = [str(SCRIPT), ",".join(presets), json.dumps(overrides), str(steps), "eth0", str(target)]
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        ranks.append(host.start([*command, *where, *script], env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [rank.communicate(timeout=400)[0].decode() for rank in ranks]
    finally:
        for host, rank in zip(lab.nodes, ranks):
            if rank.poll() is None:
                host.run(["pkill", "-9", "-f", SCRIPT.name], check=False)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(outputs))
    return json.loads(target.read_text())


def main() -> int:
    """Print the table of docs/launch.md; 1 when bytes are more than 5 % off the formula."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--mbit", type=float, default=100.0)
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="elas-link-") as name:
        lab = Lab(Path(name))
        try:
            Ssh(lab)
            print("| link | model | bytes a step | by formula | off | step, s |\n|---|---|---|---|---|---|", flush=True)
            for mbit in (None, options.mbit):
                if mbit:
                    lab.shape(lab.nodes[0], mbit)
                rows = measure(lab, Path(name), ("60m-full", "60m"), SHAPE, options.steps)
                for row in rows:
                    off = row["bytes"] / row["formula_bytes"] - 1
                    worst = max(worst, abs(off))
                    link = f"{mbit:g} Mbit/s" if mbit else "not shaped"
                    sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("bytes", "formula_bytes")]
                    cells = [link, row["preset"], *sizes, f"{off:+.1%}", f"{statistics.median(row['seconds']):.2f}"]
                    print(f"| {' | '.join(cells)} |", flush=True)
                full, ours = rows
                times = [statistics.median(row["seconds"]) for row in rows]
                print(f"full rank ÷ bottleneck: bytes {full['bytes'] / ours['bytes']:.2f}, "
                      f"step {times[0] / times[1]:.2f}", flush=True)  # fmt: skip
        finally:
            lab.close()
    return 1 if worst > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
