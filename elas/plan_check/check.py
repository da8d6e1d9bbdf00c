"""`elas plan --check`: real steps of a configuration on this machine, beside what the formulas predict."""

import json
from pathlib import Path
from typing import Any

from elas.config import Config, load_config, split_overrides
from elas.config.arguments import SettingsParser
from elas.config.deepspeed import choose_zero_stage, offloads_optimizer, read_deepspeed_json
from elas.config.describe import describe, describe_layout
from elas.config.rules import validate
from elas.console import Heartbeat, table
from elas.errors import UserError
from elas.files import write_json
from elas.launch.job import whole_number
from elas.plan.cli import THIS_MACHINE, machine_of
from elas.plan.hardware import Machine, measured_machine
from elas.plan.memory import estimate
from elas.plan.rates import halfway, measured_from
from elas.plan.step_time import step_time
from elas.plan.traffic import traffic
from elas.plan_check.components import components
from elas.plan_check.ranks import SHAPES, on_ranks, usable

FIXED = {"sparsity.dense_steps": 0, "data.packing": "packed"}
"""Settings of every check: 2:4 from the first step on, and samples without padding."""
MORE_STEPS = 6
"""Steps besides those that are timed: to warm up, to count bytes, memory and FLOPs."""


def main(argv: list[str]) -> int:
    """Run `elas plan --check`; returns 1 if a component differs that must agree, raises `UserError` for mistakes."""
    overrides, rest = split_overrides(argv)
    parser = SettingsParser(
        "elas plan --check",
        "Run steps of a configuration on this machine, on random tokens, beside what is predicted. Writes nothing.",
        "elas plan --check 60m --ranks 2 --parallel.tensor 2 --model.num_layers 4 --train.global_batch_size 8",
    )
    parser.add_argument("--check", required=True, metavar="CONFIG", help="YAML file, or a preset's name")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: tensor × pipeline)")
    parser.add_argument("--steps", type=int, default=5, metavar="K", help="timed steps (default: %(default)s)")
    where = "measured rates (default: where elas plan --measure writes)"
    parser.add_argument("--hardware-file", type=Path, metavar="FILE", help=where)
    here = "measure rates in the same ranks, before and after the steps, but Python's; for machines that others use too"
    parser.add_argument("--measure-here", action="store_true", help=here)
    options = parser.parse_args(rest)
    whole_number("--ranks", options.ranks)
    whole_number("--steps", options.steps)
    given = {**overrides, **FIXED}
    config = load_config(options.check, given)
    world = options.ranks or config.parallel.tensor * config.parallel.pipeline
    choose_zero_stage(config, world)
    validate(config, world)
    machine = machine_of(THIS_MACHINE, options.hardware_file)
    from elas import accelerator  # imports torch, which takes seconds: after the checks of files

    accelerator.prepare()
    accelerator.check_gpus(world)
    _check_device(machine)
    _say_first(config, world, machine, options.steps)
    facts = checked(options.check, given, world, machine, options.steps, measure_here=options.measure_here)
    write_json(options.json, facts)
    _show(facts)
    return 0 if all(one["agrees"] for one in facts["components"]) else 1


def checked(
    source: str, overrides: dict[str, Any], world: int, machine: Machine, steps: int, *, measure_here: bool = False
) -> dict[str, Any]:
    """Run the steps; facts with every component, the last of them the step's time.

    Args:
        source: YAML file or preset.
        overrides: settings over it, validated, `FIXED` among them.
        world: number of ranks.
        machine: measured.
        steps: to time.
        measure_here: measure rates in the same ranks; `machine` then gives only what Python needs.
    """
    config = load_config(source, overrides)
    choose_zero_stage(config, world)
    from elas.engine.prebuild import prebuild

    wanted = _wanted(machine, config.train.dtype) if measure_here else None
    with Heartbeat(f"checking on {world} ranks"):
        prebuild(config)
        job = {"source": source, "overrides": json.loads(json.dumps(overrides)), "steps": steps}
        ranks = on_ranks("check", {**job, "rates": wanted}, world)
    if measure_here:
        machine = _machine_then(machine, world, ranks[0]["rates"])
    found = components(config, world, machine, ranks)
    parallel = config.parallel
    layout = describe_layout(
        tensor=parallel.tensor, pipeline=parallel.pipeline, data=world // (parallel.tensor * parallel.pipeline),
        zero=parallel.zero or 0, sequence=parallel.sequence, virtual=parallel.virtual_pipeline,
    )  # fmt: skip
    time = step_time(config, world, machine, traffic(config, world))
    return {
        "model": describe(config),
        "dtype": config.train.dtype,
        "layout": layout,
        "ranks": world,
        "settings": overrides,
        "steps": [max(row["step"] for row in rows) for rows in zip(*(one["steps"] for one in ranks))],
        "predicted_parts": vars(time),
        "measured": machine.measured.to_dict() if machine.measured else None,
        "components": [one.to_dict() for one in found],
    }


def _wanted(machine: Machine, dtype: str) -> dict[str, Any]:
    """What ranks are to measure beside the steps."""
    assert machine.measured is not None  # `this-machine`
    rates = machine.measured.rates(1, dtype)
    host = {"layer_s": rates.host_layer_s, "batch_s": rates.host_batch_s, "step_s": rates.host_step_s}
    return {**SHAPES[machine.device], "dtypes": [dtype], "host": host}


def _machine_then(machine: Machine, world: int, measured: list[dict[str, Any]]) -> Machine:
    """The machine as the ranks found it: halfway between before and after the steps."""
    assert machine.measured is not None
    found = halfway(*({key: one[key] for key in ("busy", "links")} for one in measured))
    return measured_machine(measured_from({**machine.measured.to_dict(), "ranks": world, **found}))


def _check_device(machine: Machine) -> None:
    """Raises `UserError` if rates of a GPU are to predict steps on a CPU, or the other way round."""
    from elas import accelerator

    here = "cuda" if accelerator.has_cuda() else "cpu"
    if machine.device != here:
        raise UserError(f"--hardware-file: has rates of {machine.device}, steps would run on {here}; measure here")


def _say_first(config: Config, world: int, machine: Machine, steps: int) -> None:
    """Print what cannot be checked, and how long it takes; refuses what does not fit into the memory.

    Raises:
        UserError: the ranks together need more memory than is free.
    """
    needed = world * estimate(config, world, machine.device).total
    from elas.bench.step_models import free_memory

    free = free_memory()
    if free is not None and machine.device == "cpu" and 2 * needed > free:
        fix = "give a smaller train.micro_batch_size, model.num_layers or --ranks"
        raise UserError(f"{world} ranks need about {needed / 1e9:.1f} GB, and again as much to count FLOPs; "
                        f"{free / 1e9:.1f} are free; {fix}")  # fmt: skip
    for note in _unchecked(config, world, machine):
        print(f"note: {note}", flush=True)
    seconds = step_time(config, world, machine, traffic(config, world)).total
    print(f"{steps} timed steps of about {seconds:.1f} s and {MORE_STEPS} others", flush=True)


def _unchecked(config: Config, world: int, machine: Machine) -> list[str]:
    """What cannot be checked here, a line each."""
    notes = []
    if world > usable():
        notes.append(f"{world} ranks take turns on {usable()} cores; times are those of this machine, not of {world}")
    if machine.device == "cuda":
        notes.append("on a GPU neither parts of the time nor memory of gradients and head are measured")
    if config.parallel.virtual_pipeline > 1:
        notes.append("of an interleaved pipeline neither memory of gradients nor of the head is measured")
    if offloads_optimizer(read_deepspeed_json(config)):
        notes.append("the time of an offloaded optimizer is not predicted")
    if config.optimizer.kind not in ("adamw", "muon"):
        notes.append(f"the time of an update is predicted for adamw, not for {config.optimizer.kind}")
    return notes


def _show(facts: dict[str, Any]) -> None:
    print(f"{facts['model']}, {facts['dtype']}; {facts['layout']}")
    rows = []
    for one in facts["components"]:
        off = "" if one["off"] is None else f"{one['off']:+.1%}"
        rule = "" if one["within"] is None else "equal" if one["within"] == 0 else f"within {one['within']:.1%}"
        verdict = rule if one["agrees"] else f"DIFFERS, {rule} required"
        rows.append([one["name"], _number(one, "predicted"), _number(one, "measured"), off, verdict])
    print(table(["", "predicted", "measured", "off", "must agree"], rows))


def _number(one: dict[str, Any], which: str) -> str:
    value, unit = one[which], one["unit"]
    if value is None:
        return "–"
    if unit == "s":
        return f"{value:.3f} s"
    if unit == "B":
        return f"{value / 1e6:,.2f} MB"
    return f"{value / 1e9:,.3f} GFLOP" if unit == "FLOP" else f"{value:,.0f}"
