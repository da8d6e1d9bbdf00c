"""Predicted and measured steps of layouts on this machine: `python docs/experiments/plan_check.py`.

Measures the machine's rates, runs `elas plan --check` on every layout below (medians of its steps),
measures the rates again, and writes docs/experiments/results/plan_check.json, which docs/plan.md shows. Predictions use
the rates of both measurements, averaged: they were taken before and after, as the machine's speed drifts.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from elas import accelerator
from elas.config import load_config
from elas.config.rules import validate
from elas.plan.hardware import Machine, measured_machine
from elas.plan.rates import Measured, measured_from, read_measured

RESULT = Path(__file__).resolve().parent / "results" / "plan_check.json"
SHAPE = {"model.num_layers": 4, "model.seq_length": 256, "train.micro_batch_size": 4, "train.global_batch_size": 8}
FP32, BF16 = {"train.dtype": "float32"}, {"train.dtype": "bfloat16"}
SWIGLU = {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none",
          "model.ffn_hidden_size": 1376}  # fmt: skip


def layout(**sizes) -> dict:
    """Settings of `parallel`."""
    return {f"parallel.{key}": value for key, value in sizes.items()}


TP2, SP2, PP2 = layout(tensor=2), layout(tensor=2, sequence=True), layout(pipeline=2)
CASES = {  # name: (ranks, settings)
    "1 rank": (1, FP32),
    "1 rank, bf16": (1, BF16),
    "1 rank, full-rank SwiGLU": (1, {**FP32, **SWIGLU}),
    "1 rank, layers recomputed": (1, {**FP32, "train.recompute": "layer"}),
    "TP 2": (2, {**FP32, **TP2}),
    "TP 2, sequence parallel": (2, {**FP32, **SP2}),
    "TP 2, sequence parallel, bf16": (2, {**BF16, **SP2}),
    "TP 2, full-rank SwiGLU": (2, {**FP32, **TP2, **SWIGLU}),
    "PP 2": (2, {**FP32, **PP2}),
    "PP 2, two chunks each": (2, {**FP32, **layout(pipeline=2, virtual_pipeline=2)}),
    "DP 2, ZeRO 0": (2, {**FP32, **layout(zero=0)}),
    "DP 2, ZeRO 1": (2, {**FP32, **layout(zero=1)}),
    "DP 2, ZeRO 1, bf16": (2, {**BF16, **layout(zero=1)}),
    "DP 2, ZeRO 2": (2, {**FP32, **layout(zero=2)}),
    "DP 2, ZeRO 3": (2, {**FP32, **layout(zero=3)}),
    "TP 2 × DP 2, ZeRO 1": (4, {**FP32, **layout(tensor=2, zero=1)}),
}


def main() -> int:
    """Measure every case, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="CASE", help="names, to try; nothing is written")
    parser.add_argument("--hardware-file", type=Path, help="instead of measuring before and after")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    accelerator.prepare()
    from elas.plan_check.check import FIXED, checked
    from elas.plan_check.measure import measure
    from elas.plan_check.ranks import usable

    load = os.getloadavg()[0]
    given = read_measured(options.hardware_file) if options.hardware_file else None
    before = given or measure(usable())
    found = {}
    for name in options.only or CASES:
        world, settings = CASES[name]
        overrides = {**SHAPE, **settings, **FIXED}
        validate(load_config("60m", overrides), world)
        found[name] = checked("60m", overrides, world, measured_machine(before), options.steps)
        step = found[name]["components"][-1]
        print(f"{name}: predicted {step['predicted']:.2f} s, measured {step['measured']:.2f} s", flush=True)
        wrong = [one["name"] for one in found[name]["components"] if not one["agrees"]]
        print(f"  {'DIFFER: ' + ', '.join(wrong) if wrong else 'exact components agree'}", flush=True)
    if options.only:
        print(json.dumps([row(name, facts, measured_machine(before)) for name, facts in found.items()], indent=1))
        return 0
    between = mean(before, given or measure(usable()))
    rows = [row(name, facts, measured_machine(between)) for name, facts in found.items()]
    facts = {"rows": rows, "measured": between.to_dict(), "load_before": load, "load_after": os.getloadavg()[0]}
    RESULT.write_text(json.dumps({**facts, "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    return 0


def mean(one: Measured, other: Measured) -> Measured:
    """Rates halfway between two measurements of a machine."""

    def halfway(a, b):
        return {key: halfway(a[key], b[key]) for key in a} if isinstance(a, dict) else (a + b) / 2

    first, second = one.to_dict(), other.to_dict()
    return measured_from({**first, **{key: halfway(first[key], second[key]) for key in ("busy", "links")}})


def row(name: str, facts: dict, machine: Machine) -> dict:
    """What the page shows of a layout, predicted anew with `machine`'s rates."""
    from elas.config.deepspeed import choose_zero_stage
    from elas.plan.step_time import step_time
    from elas.plan.traffic import traffic

    config = load_config("60m", facts["settings"])
    choose_zero_stage(config, facts["ranks"])
    parts = step_time(config, facts["ranks"], machine, traffic(config, facts["ranks"]))
    measured = {one["name"]: one["measured"] for one in facts["components"]}
    return {
        "case": name,
        "ranks": facts["ranks"],
        "predicted_s": parts.total,
        "measured_s": measured["step"],
        "steps_s": facts["steps"],
        "predicted_parts": dataclasses.asdict(parts),
        "measured_parts": {key: measured[key] for key in PARTS},
        "exact": [one["name"] for one in facts["components"] if one["within"] is not None],
        "differ": [one["name"] for one in facts["components"] if not one["agrees"]],
        "components": facts["components"],
    }


PARTS = ("forward and backward", "collectives", "messages and bubble", "update")


if __name__ == "__main__":
    sys.exit(main())
