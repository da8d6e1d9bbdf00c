"""`elas plan`: which layout of a configuration fits into a number of GPUs, and how fast it would be, on paper."""

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elas.command import Parser
from elas.config import Config, load_config, presets, recompute_of, split_overrides
from elas.config.arguments import SettingsParser
from elas.config.describe import describe
from elas.config.rules import check_ranges
from elas.errors import UserError
from elas.files import write_json
from elas.plan.counts import parameter_count
from elas.plan.flops import hardware_flops, model_flops
from elas.plan.hardware import MACHINES, Machine, measured_machine
from elas.plan.rates import EFFICIENCY, default_file, read_measured
from elas.plan.rivals import kept_by, rivals_of
from elas.plan.search import Plan, best, gpus_in_words, layout_settings, plans, word
from elas.plan.show import draw, show

EXAMPLE = "elas plan --config 7b --hardware h100 --gpus 256"
THIS_MACHINE = "this-machine"
MOST_GPUS = 2**20
MOST_ROWS = 200
"""Of layouts in the JSON, the best first."""
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGBTkmgbt]?)")
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_TIME = {"h": 1 / 24, "d": 1.0, "w": 7.0}


def main(argv: list[str]) -> int:
    """Run `elas plan ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    options.gpus = _count("--gpus", options.gpus) if options.gpus else None
    options.top = _count("--top", options.top)
    for flag, path in (("--yaml", options.yaml), ("--picture", options.picture)):
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise UserError(f"{flag} {path}: is a folder or cannot be written; give a file's path")
    config = load_config(options.config, overrides)
    check_ranges(config)
    kept = _kept(config, overrides)
    machine = machine_of(options.hardware, options.hardware_file)
    if machine.device == "cuda" and machine.measured:
        options.gpus = options.gpus or machine.gpus
        if options.gpus > machine.gpus:
            raise UserError(f"--gpus {options.gpus}: {machine.gpus} were measured, and no link to others; give fewer")
    tokens = _tokens(options.tokens) if options.tokens else None
    if options.deadline:
        if tokens is None:
            raise UserError("--deadline requires --tokens: of how many tokens until then?")
        gpus = _enough(config, machine, kept, tokens, options.deadline, options.gpus)
    else:
        gpus = options.gpus or machine.gpus
    found = plans(config, gpus, machine, kept)
    chosen = best(config, gpus, machine, kept)
    rivals = {name: best(one, gpus, machine, kept_by(one, kept)) for name, one in rivals_of(config).items()}
    facts = _facts(config, gpus, options.hardware, machine, found, chosen, rivals, tokens) | {"kept": kept}
    write_json(options.json, facts)
    if options.yaml and chosen:
        options.yaml.write_text(_yaml(options.config, overrides, config, chosen))
    show(config, gpus, options, machine, kept, found, chosen, rivals, tokens)
    if options.picture and found:
        draw(found, chosen, machine, options.picture)
    return 0 if chosen else 1


def _parser() -> Parser:
    what = "Layouts, memory and time of a run on a number of GPUs, on paper. What the command line says of the layout "
    what += "(--parallel.tensor, --parallel.zero, --train.micro_batch_size, …) is kept; null leaves it to the search. "
    what += (
        "See also elas plan --measure --help (this machine's rates) and elas plan --check --help (beside real steps)."
    )
    parser = SettingsParser("elas plan", what, EXAMPLE)
    parser.add_argument("--config", "--preset", required=True, help="YAML file, or a preset: " + ", ".join(presets()))
    known = [*MACHINES, THIS_MACHINE]
    parser.add_argument("--hardware", choices=known, default="h100", help="default: h100, nodes of eight")
    where = "of this-machine (default: where elas plan --measure writes)"
    parser.add_argument("--hardware-file", type=Path, metavar="FILE", help=where)
    parser.add_argument("--gpus", metavar="N", help="number of GPUs (default: a node; with --deadline, most)")
    parser.add_argument("--tokens", metavar="T", help="of the run, such as 300B or 1.5T: adds days")
    parser.add_argument("--deadline", metavar="D", help="such as 30d or 12h: how many GPUs finish --tokens until then")
    parser.add_argument("--top", default="8", metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--yaml", type=Path, metavar="FILE", help="write the recommended configuration")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG: memory against step time")
    return parser


def _kept(config: Config, overrides: dict[str, Any]) -> dict[str, object]:
    """What the command line says of the layout, which the search must not change; null leaves it free."""
    settings = layout_settings(config)
    return {key: settings[key] for key in settings if overrides.get(key) is not None}


def machine_of(name: str, path: Path | None) -> Machine:
    """The machine that `--hardware` names.

    Raises:
        UserError: it is this machine, which was not measured; or a file is given for another.
    """
    if name == THIS_MACHINE:
        return measured_machine(read_measured(path or default_file()))
    if path is not None:
        raise UserError(f"--hardware-file {path}: only with --hardware {THIS_MACHINE}")
    return MACHINES[name]


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_GPUS:
        raise UserError(f"{flag} {text!r}: must be a whole number from 1 to {MOST_GPUS:,}")
    return int(text)


def _tokens(text: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--tokens {text!r}: is no number of tokens; give for example 300B or 1.5T")
    return float(match[1]) * _SCALE[match[2].lower()]


def _days(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--deadline {text!r}: is no time; give for example 12h, 30d or 4w")
    return float(match[1]) * _TIME[match[2]]


def _enough(
    config: Config, machine: Machine, kept: dict[str, object], tokens: float, deadline: str, most: int | None
) -> int:
    """The smallest power of two of GPUs that trains so many tokens in so many days.

    Raises:
        UserError: there is none up to `most`.
    """
    gpus, fastest, days = 1, math.inf, _days(deadline)
    while gpus <= (most or config.train.global_batch_size * 64):
        plan = best(config, gpus, machine, kept)
        if plan is not None:
            needed = tokens / plan.tokens_per_s / 86400
            fastest = min(fastest, needed)
            if needed <= days:
                return gpus
        gpus *= 2
    limit = f"with up to {gpus_in_words(gpus // 2)} the fastest layout needs {fastest:,.1f} days"
    fix = "a larger train.global_batch_size keeps more GPUs busy"
    if fastest == math.inf:
        given = ", ".join(f"--{key} {word(value)}" for key, value in kept.items())
        limit = f"no layout of up to {gpus_in_words(gpus // 2)}, a power of two, fits" + (
            f" with {given}" if given else ""
        )
        fix = f"{'leave these out or give others' if given else 'give other GPUs or a smaller model'}"
    raise UserError(f"--deadline {deadline}: {limit}; {fix}")


def _row(plan: Plan, machine: Machine, tokens: float | None) -> dict[str, Any]:
    parallel, train = plan.config.parallel, plan.config.train
    row: dict[str, Any] = {
        "tp": parallel.tensor,
        "pp": parallel.pipeline,
        "vpp": parallel.virtual_pipeline,
        "dp": plan.gpus // (parallel.tensor * parallel.pipeline),
        "sequence": parallel.sequence,
        "zero": parallel.zero,
        "micro_batch_size": train.micro_batch_size,
        "recompute": recompute_of(plan.config),
        "fits": plan.fits,
        "memory_gb": plan.bytes / 1e9,
        "memory": asdict(plan.memory),
        "comm_gb_per_step": plan.traffic.total / 1e9,
        "traffic": asdict(plan.traffic),
        "step_s": plan.time.total,
        "time": asdict(plan.time),
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu(machine),
    }
    return row | ({"days": tokens / plan.tokens_per_s / 86400} if tokens else {})


def _facts(config, gpus, hardware, machine: Machine, found, chosen, rivals, tokens) -> dict[str, Any]:
    return {
        "model": describe(config),
        "parameters": parameter_count(config),
        "full_rank_parameters": parameter_count(rivals_of(config).get("full rank") or config),
        "global_batch_size": config.train.global_batch_size,
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "flops_per_token": model_flops(config).training,
        "hardware_flops_per_token": hardware_flops(config),
        "gpus": gpus,
        "hardware": hardware,
        "tokens": tokens,
        "layouts": len(found),
        "fitting": sum(plan.fits for plan in found),
        "efficiency": None if machine.measured else EFFICIENCY,
        "measured": machine.measured.to_dict() if machine.measured else None,
        "recommended": {**_row(chosen, machine, tokens), "settings": chosen.settings} if chosen else None,
        "rivals": {name: _row(plan, machine, tokens) if plan else None for name, plan in rivals.items()},
        "rows": [_row(plan, machine, tokens) for plan in found[:MOST_ROWS]],
    }


def _yaml(source: str, overrides: dict[str, Any], config: Config, plan: Plan) -> str:
    """A configuration file that extends the given one; without its DeepSpeed JSON, which the plan did not read."""
    sections: dict[str, dict[str, Any]] = {}
    unread = {"parallel.deepspeed_config": None} if config.parallel.deepspeed_config else {}
    for key, value in {**overrides, **unread, **plan.settings}.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    base = source if source in presets() else str(Path(source).absolute())
    lines = [f"# elas plan: {plan.gpus} GPUs", f"base: {base}"]
    for section, values in sections.items():
        lines.append(f"{section}:")
        lines += [f"  {name}: {_scalar(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f'"{value}"' if isinstance(value, str) else str(value)
