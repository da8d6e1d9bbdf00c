"""Shows a plan: as tables, and as a picture of memory against time."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from elas.config import Config
from elas.config.describe import describe, describe_layout
from elas.console import table
from elas.plan.counts import parameter_count
from elas.plan.hardware import Machine
from elas.plan.rates import EFFICIENCY
from elas.plan.rivals import rivals_of
from elas.plan.search import USABLE, Plan, undivided, word


def show(
    config: Config,
    gpus: int,
    options: Namespace,
    machine: Machine,
    kept: Mapping[str, object],
    found: list[Plan],
    chosen: Plan | None,
    rivals: Mapping[str, Plan | None],
    tokens: float | None,
) -> None:
    """Print layouts, the parts of the best one, and its rivals.

    Args:
        config: as given.
        gpus: number of them.
        options: of the command line: `hardware`, `top`, `yaml`.
        machine: what the GPUs are.
        kept: settings that every layout has.
        found: layouts, as of `plans`.
        chosen: the recommended one; None if nothing fits.
        rivals: the best layout of each, by name.
        tokens: of the run; None if not given.
    """
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
    full = rivals_of(config).get("full rank")
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


def draw(found: list[Plan], chosen: Plan | None, machine: Machine, path: Path) -> None:
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
