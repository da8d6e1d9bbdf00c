"""Published figures beside `elas plan`'s: `python docs/experiments/plan_published.py`.

Writes docs/experiments/results/plan_published.json, which docs/plan.md shows. Nothing is measured; misses stay in the
table with their reason.
"""

import json
import sys
from pathlib import Path

from elas.config import Config, load_config
from elas.plan.counts import parameter_count
from elas.plan.flops import layer_work
from elas.plan.hardware import MACHINES
from elas.plan.memory import token_parts
from elas.plan.step_time import step_time
from elas.plan.traffic import ring, tensor_values, traffic

RESULT = Path(__file__).resolve().parent / "results" / "plan_published.json"
PARAMETERS = {"60m": (58, 43), "130m": (134, 94), "350m": (368, 185), "1b": (1339, 609)}
"""Millions, full rank and ELAS (arXiv 2605.03667)."""
GPT = {"22B": (48, 6144, 64), "175B": (96, 12288, 96), "530B": (105, 20480, 128), "1T": (128, 25600, 160)}
"""Layers, hidden size and heads (Korthikanti et al. 2022, arXiv 2205.05198); 2,048 tokens a sample, TP 8, bf16."""
TP, SEQUENCE, E = 8, 2048, 2
BOOST_S = {"full rank": 1.06, "naive low rank": 1.64, "bottleneck": 0.72}
"""Seconds a step of 7B at TP 4 (arXiv 2512.12131, MLSys '26); batch and GPU of this figure are not known to us."""


def main() -> int:
    """Compute and write."""
    facts = {"parameters": parameters(), "activations": activations(), "boost": boost()}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    return 0


def parameters() -> list[dict]:
    """Millions of parameters."""
    rows = []
    for preset, published in PARAMETERS.items():
        for name, said in zip(
            (f"{preset}-full", f"{preset}-lowrank", preset), (published[0], published[1], published[1])
        ):
            rows.append({"preset": name, "published": said, "ours": parameter_count(load_config(name)) / 1e6})
    return rows


def gpt(layers: int, hidden: int, heads: int, *, sequence: bool) -> Config:
    """Their GPT as near as ours comes: full rank, squared ReLU in place of GELU, 4h wide."""
    return load_config(None, {
        "model.num_layers": layers, "model.hidden_size": hidden, "model.num_attention_heads": heads,
        "model.ffn_hidden_size": 4 * hidden, "model.seq_length": SEQUENCE, "model.vocab_size": 51200,
        "model.activation": "relu2", "low_rank.kind": "none", "sparsity.kind": "none", "sparsity.ffn_memory": "eager",
        "parallel.tensor": TP, "parallel.sequence": sequence, "train.recompute": "none",
        "train.micro_batch_size": 1, "train.global_batch_size": 1,
    })  # fmt: skip


def activations() -> list[dict]:
    """Bytes that a layer keeps for each token, in units of h: their formulas, and ours."""
    rows = []
    for name, (layers, hidden, heads) in GPT.items():
        scores = 5 * heads * SEQUENCE / hidden / TP
        for sequence in (False, True):
            kept = 34 / TP if sequence else 10 + 24 / TP
            config = gpt(layers, hidden, heads, sequence=sequence)
            ours = {part: size / hidden for part, size in token_parts(config, E).items()}
            # Dropout masks are a byte each: after attention's output and the FFN. Of ours, v keeps q and k in memory.
            explained = kept - 2 / (TP if sequence else 1) + 2 * E / TP + ours["small"]
            rows.append({"model": name, "sequence": sequence, "published": kept + scores, "selective": kept,
                         "ours": sum(ours.values()), "explained": explained})  # fmt: skip
    return rows


def boost() -> dict:
    """Values for each token and layer over TP 4, and seconds of a step by assumed rates."""
    shape = {"parallel.tensor": 4, "parallel.zero": 0, "model.seq_length": 4096, "train.dtype": "bfloat16",
             "train.micro_batch_size": 1, "train.global_batch_size": 4, "model.activation": "swiglu",
             "train.recompute": "none", "sparsity.kind": "none", "model.ffn_hidden_size": 11008}  # fmt: skip
    kinds = {"full rank": {"low_rank.kind": "none"}, "bottleneck": {"low_rank.kind": "cola"}}
    rows = []
    for name, kind in kinds.items():
        for sequence in (False, True):
            config = load_config("7b", {**shape, **kind, "parallel.sequence": sequence})
            values = sum(ring(one, 4) for one in tensor_values(config, sequence)) / config.model.hidden_size
            seconds = step_time(config, 4, MACHINES["a100"], traffic(config, 4)).total
            flops = 3 * layer_work(config).linear / (6 * config.model.hidden_size**2)
            row = {"model": name, "sequence": sequence, "sent_over_h": values, "linear_over_h2": flops}
            rows.append(row | {"ours_s": seconds, "published_s": BOOST_S[name]})
    return {"published_s": BOOST_S, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
