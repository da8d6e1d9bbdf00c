"""The loss without logits beside others: `python docs/experiments/loss.py`, into docs/experiments/results/loss.json.

One process and thread; forward and backward of head and cross entropy, medians of rounds in turns, the allocator's
peak, and errors against fp64.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from elas.bench.measure import Memory
from elas.checkpoint.identity import versions
from elas.model.head import LinearCrossEntropy

RESULT = Path(__file__).resolve().parent / "results" / "loss.json"
SHAPES = [(1024, 1024, 32000), (2048, 256, 8192)]
ROUNDS = 5


class OneRank:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0


def ours(x, w, y):
    """Chunks of tokens, gradients in the forward pass."""
    return LinearCrossEntropy.apply(x, w, y, torch.full(y.shape, 1 / len(y)), OneRank())


def logits(x, w, y):
    """All logits in fp32."""
    return F.cross_entropy(F.linear(x, w).float(), y)


def torch_chunked(x, w, y):
    """`linear_cross_entropy` of torch 2.13 with its own choice of options."""
    return F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())


WAYS = {"ours": ours, "logits": logits, "linear_cross_entropy": torch_chunked}


def main() -> int:
    """Measure every way, dtype and shape."""
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for n, h, v in SHAPES:
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(n, h, generator=draw).to(dtype).requires_grad_()
            w = (torch.randn(v, h, generator=draw) * 0.05).to(dtype).requires_grad_()
            y = torch.randint(v, (n,), generator=draw)
            rows += _rows(x, w, y)
    RESULT.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")
    return 0


def _rows(x, w, y) -> list[dict]:
    wide = [one.detach().double().requires_grad_() for one in (x, w)]
    expected = F.cross_entropy(F.linear(*wide), y)
    expected.backward()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    errors, peaks = {}, {}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            x.grad = w.grad = None
            start = time.perf_counter()
            loss = way(x, w, y)
            loss.backward()
            times[name].append(time.perf_counter() - start)
            pairs = ((loss, expected), (x.grad, wide[0].grad), (w.grad, wide[1].grad))
            errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    for name, way in WAYS.items():
        x.grad = w.grad = None
        with Memory(torch.device("cpu")) as memory:
            way(x, w, y).backward()
        peaks[name] = memory.peak
    shape = {"dtype": str(x.dtype).removeprefix("torch."), "tokens": len(x), "hidden": x.shape[1], "vocabulary": len(w)}
    rows = []
    for name in WAYS:
        loss, of_hidden, of_weight = errors[name]
        rows.append({**shape, "way": name, "seconds": statistics.median(times[name]), "peak_bytes": peaks[name]})
        rows[-1] |= {"loss_error": loss, "hidden_error": of_hidden, "weight_error": of_weight}
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
