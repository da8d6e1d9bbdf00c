"""`elas plan`: which layout of a configuration fits into a number of GPUs, and how fast it would be, on paper."""

import dataclasses
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elas.command import Parser
from elas.config import Config, load_config, presets, recompute_of, split_overrides
from elas.config.arguments import SettingsParser
from elas.config.describe import describe, describe_layout
from elas.config.rules import check_ranges
from elas.config.schema import OWN_SETTINGS, OptimizerConfig
from elas.console import table
from elas.errors import UserError
from elas.files import write_json
from elas.plan.counts import gated_width, parameter_count
from elas.plan.flops import hardware_flops, model_flops
from elas.plan.hardware import MACHINES, Machine, measured_machine
from elas.plan.rates import EFFICIENCY, default_file, read_measured
from elas.plan.search import USABLE, Plan, best, gpus_in_words, layout_settings, plans, undivided, word

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
    rivals = {name: best(one, gpus, machine, _of_rival(one, kept)) for name, one in _rivals(config).items()}
    facts = _facts(config, gpus, options.hardware, machine, found, chosen, rivals, tokens) | {"kept": kept}
    write_json(options.json, facts)
    if options.yaml and chosen:
        options.yaml.write_text(_yaml(options.config, overrides, config, chosen))
    _print(config, gpus, options, machine, kept, found, chosen, rivals, tokens)
    if options.picture and found:
        _draw(found, chosen, machine, options.picture)
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


def _of_rival(rival: Config, kept: dict[str, object]) -> dict[str, object]:
    """What a rival's layouts must have: the same, but that full rank has no bottleneck to recompute from."""
    free = rival.low_rank.kind == "none" and kept.get("train.recompute") == "bottleneck"
    return {key: value for key, value in kept.items() if not (free and key == "train.recompute")}


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


def _rivals(config: Config) -> dict[str, Config]:
    """The same shape at full rank, and at low rank without 2:4."""
    model, sparsity = config.model, config.sparsity
    gated: dict[str, Any] = {"activation": "swiglu"}
    if config.model.activation != "swiglu":
        gated["ffn_hidden_size"] = gated_width(config)
    none: dict[str, Any] = {"kind": "none"}
    loro = config.optimizer.kind == "loro"
    own = {name: getattr(OptimizerConfig(), name) for name in OWN_SETTINGS["loro"]}
    adamw: dict[str, Any] = {"kind": "adamw", **own} if loro else {}
    schedule: dict[str, Any] = {"kind": "cosine"} if loro and config.schedule.kind == "cosine_restart" else {}
    full = dataclasses.replace(
        config,
        model=dataclasses.replace(model, **gated),
        low_rank=dataclasses.replace(config.low_rank, **none),
        sparsity=dataclasses.replace(sparsity, **none),
        optimizer=dataclasses.replace(config.optimizer, **adamw),
        schedule=dataclasses.replace(config.schedule, **schedule),
        train=dataclasses.replace(config.train, recompute=None),
    )
    kept: dict[str, Any] = {"ffn_memory": "eager"}
    dense = dataclasses.replace(config, sparsity=dataclasses.replace(sparsity, **none, **kept))
    found = {}
    if config.low_rank.kind != "none":
        found["full rank"] = full
    if config.sparsity.kind != "none" and config.low_rank.kind != "none":
        found["low rank"] = dense
    return found


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
        "full_rank_parameters": parameter_count(_rivals(config).get("full rank") or config),
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


def _print(config, gpus, options, machine: Machine, kept, found, chosen, rivals, tokens) -> None:
    batch, seq = config.train.global_batch_size, config.model.seq_length
    print(f"{describe(config)}, {_parameters(config)}, {config.train.dtype}")
    print(f"global batch {batch:,} × {seq:,} tokens = {batch * seq:,} tokens a step; "
          f"{gpus:,} × {options.hardware}, {machine.memory / 1e9:.0f} GB each")  # fmt: skip
    if kept:
        print(f"as given: {', '.join(f'{key}={word(value)}' for key, value in kept.items())}")
    if config.parallel.deepspeed_config:
        print("note: parallel.deepspeed_config is not read here: layouts have what ELAS sets for their ZeRO stage, "
              "and --yaml leaves it out")  # fmt: skip
    unwritten = f"; not written: {options.yaml}" if options.yaml else ""
    if not found:
        print(undivided(config, gpus, machine, kept) + unwritten)
        return
    fitting = sum(plan.fits for plan in found)
    number = "1 layout divides" if len(found) == 1 else f"{len(found):,} layouts divide"
    print(f"{number} the model, the batch and the GPUs; {fitting:,} of them fit into memory, "
          f"that is into {USABLE:.0%} of {_less(machine)}\n")  # fmt: skip
    days = ["days"] if tokens else []
    headers = ["layout", "micro-batch", "recompute", "GB", "step s", "tokens/s", "MFU", *days]
    shown = found[: options.top] if chosen else found[: min(3, options.top)]
    print(table(headers, [_cells(plan, machine, tokens) for plan in shown], left=3))
    if chosen is None:
        print("\nnothing fits; the smallest layouts are shown" + unwritten)
        return
    parts = [f"{name} {value / chosen.time.total:.0%}" for name, value in asdict(chosen.time).items() if value > 0]
    print(f"\nthe first: time {', '.join(parts)}")
    memory = asdict(chosen.memory) | {"runtime": int(chosen.context)}
    print(f"memory {', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in memory.items())}")
    if rivals:
        print("\neach at its best layout:")
        rows = [["as configured", *_cells(chosen, machine, tokens)]]
        rows += [[name, *_cells(plan, machine, tokens)] if plan else [name, "nothing fits", *[""] * (len(headers) - 1)]
                 for name, plan in rivals.items()]  # fmt: skip
        print(table(["", *headers], rows, left=4))
    print(f"\n{_basis(machine, gpus, config.train.dtype)}; nothing overlaps")
    if options.yaml:
        each = max(n for n in range(1, machine.gpus + 1) if gpus % n == 0)  # nodes alike, with exactly these GPUs
        nodes = gpus // each
        print(f"\nwritten: {options.yaml}; elas launch slurm --nodes {nodes} --gpus-per-node {each} "
              f"--config {options.yaml} …")  # fmt: skip


def _parameters(config: Config) -> str:
    """The number of parameters; of low rank, beside the one of the same shape at full rank."""
    text = f"{parameter_count(config) / 1e6:,.1f} M parameters"
    full = _rivals(config).get("full rank")
    return f"{text} (low rank; at full rank {parameter_count(full) / 1e6:,.1f} M)" if full else text


def _less(machine: Machine) -> str:
    if machine.device == "cpu":
        return f"a rank's share of {machine.memory / 1e9:g} GB"
    return f"a GPU's {machine.memory / 1e9:g} GB less {machine.context / 1e9:g} GB for CUDA and NCCL"


def _basis(machine: Machine, gpus: int, dtype: str) -> str:
    """Where the rates come from, in a line."""
    measured = machine.measured
    if measured is None:
        return "assumed shares of the peak: " + ", ".join(f"{kind} {share:.0%}" for kind, share in EFFICIENCY.items())
    rates = measured.rates(gpus, dtype)
    named = {"full-rank products": rates.full_rank, "factor products": max(rates.factor.values())}
    named |= {"2:4 FFN core": max(rates.core.values()), "scores": rates.scores, "head": rates.head}
    shown = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in named.items())
    crowd = f"; {gpus} ranks share what {measured.ranks} had" if gpus > measured.ranks else ""
    return f"measured on {measured.name}, {measured.about.get('date', '')}: {shown}{crowd}"


def _cells(plan: Plan, machine: Machine, tokens: float | None) -> list[str]:
    parallel, settings = plan.config.parallel, plan.settings
    layout = describe_layout(
        tensor=parallel.tensor, pipeline=parallel.pipeline, data=plan.gpus // (parallel.tensor * parallel.pipeline),
        zero=parallel.zero or 0, sequence=parallel.sequence, virtual=parallel.virtual_pipeline,
    )  # fmt: skip
    cells = [
        layout,
        f"{settings['train.micro_batch_size']}",
        str(settings["train.recompute"]),
        f"{plan.bytes / 1e9:.1f}",
    ]
    cells += [f"{plan.time.total:.3f}", f"{plan.tokens_per_s:,.0f}", f"{plan.mfu(machine):.1%}"]
    return [*cells, f"{tokens / plan.tokens_per_s / 86400:,.1f}"] if tokens else cells


def _draw(found: list[Plan], chosen: Plan | None, machine: Machine, path: Path) -> None:
    """Memory against step time, of every layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for fits, color, label in ((True, "#35618f", "fits"), (False, "#c8553d", "does not fit")):
        some = [plan for plan in found if plan.fits == fits]
        axes.scatter(
            [p.time.total for p in some], [p.bytes / 1e9 for p in some], s=9, color=color, alpha=0.5, label=label
        )
    if chosen:
        axes.scatter([chosen.time.total], [chosen.bytes / 1e9], s=90, marker="*", color="#e0a030", label="recommended")
    axes.axhline(machine.memory / 1e9, color="#888888", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="seconds a step", ylabel="GB of a GPU")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
