"""Predicted and measured steps of layouts on this machine: `python docs/experiments/plan_check.py`.

Measures the machine, runs `elas plan --check --measure-here` on every layout below (medians of its steps), and writes
docs/experiments/results/plan_check.json, which docs/plan.md shows. Rates are those that the same ranks measured just
before and after their steps, since the machine's speed drifts; only what Python needs is from the first measurement.
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
from elas.plan.rates import measured_from, read_measured
from elas.plan.step_time import StepTime, step_time
from elas.plan.traffic import traffic

RESULT = Path(__file__).resolve().parent / "results" / "plan_check.json"
SHAPE = {"model.num_layers": 4, "model.seq_length": 256, "train.micro_batch_size": 2, "train.global_batch_size": 4}
FP32, BF16 = {"train.dtype": "float32"}, {"train.dtype": "bfloat16"}
SWIGLU = {"low_rank.kind": "none", "model.activation": "swiglu", "sparsity.kind": "none",
          "model.ffn_hidden_size": 1376}  # fmt: skip


def layout(**sizes) -> dict:
    """Settings of `parallel`."""
    return {f"parallel.{key}": value for key, value in sizes.items()}


TP2, SP2, PP2 = layout(tensor=2), layout(tensor=2, sequence=True), layout(pipeline=2)
CASES = {  # name: (ranks, settings)
    "1 rank": (1, FP32),
    "TP 2": (2, {**FP32, **TP2}),
    "PP 2": (2, {**FP32, **PP2}),
    "DP 2, ZeRO 1": (2, {**FP32, **layout(zero=1)}),
    "1 rank, bf16": (1, BF16),
    "TP 2, sequence parallel, bf16": (2, {**BF16, **SP2}),
    "1 rank, full-rank SwiGLU": (1, {**FP32, **SWIGLU}),
    "1 rank, layers recomputed": (1, {**FP32, "train.recompute": "layer"}),
    "DP 2, ZeRO 2": (2, {**FP32, **layout(zero=2)}),
    "DP 2, ZeRO 3": (2, {**FP32, **layout(zero=3)}),
    "TP 2 × DP 2, ZeRO 1": (4, {**FP32, **layout(tensor=2, zero=1)}),
    "PP 2, two chunks each": (2, {**FP32, **layout(pipeline=2, virtual_pipeline=2)}),
    "TP 2, sequence parallel": (2, {**FP32, **SP2}),
    "DP 2, ZeRO 0": (2, {**FP32, **layout(zero=0)}),
    "DP 2, ZeRO 1, bf16": (2, {**BF16, **layout(zero=1)}),
    "TP 2, full-rank SwiGLU": (2, {**FP32, **TP2, **SWIGLU}),
}


def main() -> int:
    """Measure every case, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="CASE", help="names, to try; nothing is written")
    parser.add_argument("--hardware-file", type=Path, help="instead of measuring first")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--missing", action="store_true", help="keep the result file's layouts and add the others")
    parser.add_argument("--again", action="store_true", help="only predict anew what the result file has measured")
    options = parser.parse_args()
    if options.again:
        return again()
    accelerator.prepare()
    from elas.plan_check.check import FIXED, checked
    from elas.plan_check.measure import measure
    from elas.plan_check.ranks import usable

    load = os.getloadavg()[0]
    measured = read_measured(options.hardware_file) if options.hardware_file else measure(usable())
    kept = json.loads(RESULT.read_text()) if options.missing and RESULT.exists() else {"rows": []}
    rows, done = kept["rows"], {one["case"] for one in kept["rows"]}
    for name in [one for one in options.only or CASES if one not in done]:
        world, settings = CASES[name]
        overrides = {**SHAPE, **settings, **FIXED}
        validate(load_config("60m", overrides), world)
        facts = checked("60m", overrides, world, measured_machine(measured), options.steps, measure_here=True)
        rows.append(row(name, facts))
        print(f"{name}: predicted {rows[-1]['predicted_s']:.2f} s, measured {rows[-1]['measured_s']:.2f} s", flush=True)
        print(f"  {', '.join(rows[-1]['differ']) or 'nothing'} differs", flush=True)
        loads = {"load_before": load, "load_after": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}
        target = Path("/dev/stdout") if options.only else RESULT
        target.write_text(json.dumps({"rows": rows, "measured": measured.to_dict(), **loads}, indent=1) + "\n")
    return 0


def again() -> int:
    """Replace the predictions in the result file by today's, with the rates that it has."""
    facts = json.loads(RESULT.read_text())
    for one in facts["rows"]:
        parts = predict(one["case"], measured_machine(measured_from(one["rates"])))
        one |= {"predicted_s": parts.total, "predicted_parts": dataclasses.asdict(parts)}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def predict(name: str, machine: Machine) -> StepTime:
    """Of a case."""
    from elas.config.deepspeed import choose_zero_stage

    world, settings = CASES[name]
    config = load_config("60m", {**SHAPE, **settings, "sparsity.dense_steps": 0})
    choose_zero_stage(config, world)
    return step_time(config, world, machine, traffic(config, world))


def row(name: str, facts: dict) -> dict:
    """What the page shows of a layout."""
    measured = {one["name"]: one["measured"] for one in facts["components"]}
    return {
        "case": name,
        "ranks": facts["ranks"],
        "predicted_s": facts["components"][-1]["predicted"],
        "measured_s": measured["step"],
        "steps_s": facts["steps"],
        "predicted_parts": facts["predicted_parts"],
        "measured_parts": {key: measured[key] for key in PARTS},
        "differ": [one["name"] for one in facts["components"] if not one["agrees"]],
        "components": facts["components"],
        "rates": facts["measured"],
    }


PARTS = ("forward and backward", "collectives", "messages and bubble", "update")


if __name__ == "__main__":
    sys.exit(main())
