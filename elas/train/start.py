"""The lines that a run prints before and after its first step: model, kernel, data, estimated time and memory."""

import torch
import torch.distributed as dist

from elas import accelerator
from elas.config import Config, recompute_of
from elas.config.describe import describe, describe_layout, describe_optimizer
from elas.console import clock
from elas.engine.engine import Engine
from elas.model import kernel
from elas.model.provider import count_parameters
from elas.parallel import Layout
from elas.plan.run import run_facts


def announcement(config: Config, layout: Layout, engine: Engine, step: int) -> tuple[list[str], dict]:
    """The lines of model, optimizer, kernel and data, and all their facts; every rank must call it."""
    model, model_facts = model_line(config, layout, engine)
    kernel, kernel_facts = kernel_line(config)
    data, data_facts = data_line(config, layout, step)
    optimizer = f"optimizer: {describe_optimizer(config)}"
    return [model, optimizer, kernel, data], {**model_facts, **kernel_facts, **data_facts}


def model_line(config: Config, layout: Layout, engine: Engine) -> tuple[str, dict]:
    """The model and its layout, as a line and as facts; every rank must call it."""
    parameters = count_parameters(engine.chunks)
    ranks = describe_layout(
        tensor=layout.tp,
        pipeline=layout.pp,
        data=layout.dp,
        zero=engine.stage,
        sequence=layout.sequence_parallel,
        virtual=layout.vpp,
    )
    line = f"{describe(config)}, {config.train.dtype}, {parameters / 1e6:.1f} M parameters; {ranks}"
    line += f"; recompute {recompute_of(config)}"
    return line, {
        "parameters": parameters,
        "recompute": recompute_of(config),
        "world_size": layout.world,
        "layout": ranks,
    }


def kernel_line(config: Config) -> tuple[str, dict]:
    """Which implementation computes the FFN's core and why, as a line and as facts."""
    if config.model.activation != "relu2":
        name, why = "torch", "a gated FFN has no kernel of its own"
    else:
        chosen, why = kernel.chosen(config)
        name = f"{chosen.ffn_memory} {chosen.name}"
    return f"FFN kernel: {name} ({why})", {"kernel": name, "kernel_why": why}


def data_line(config: Config, layout: Layout, step: int) -> tuple[str, dict]:
    """The data, its epochs and the estimated memory, with the figures of `elas train --dry-run`.

    Args:
        config: the run's configuration.
        layout: the layout of its ranks.
        step: steps taken before this start.

    Returns:
        A line, and the same as facts.
    """
    facts = run_facts(config, layout.world, step)
    of = f"{facts['epochs']:.3g} epochs of {facts['corpus_tokens']:,}"
    if len(facts["sources"]) > 1:
        of += " (" + ", ".join(f"{one['prefix']} {one['epochs']:.3g}" for one in facts["sources"]) + ")"
    valid = f"{facts['valid_tokens']:,} tokens" if facts["valid_tokens"] else "off"
    memory = memory_in_words(facts["memory_bytes"])
    data = f"{facts['tokens']:,} tokens in {config.train.steps:,} steps: {of}"
    line = f"{data}; validation: {valid}; memory per rank: about {memory}"
    return line, {key: facts[key] for key in ("tokens", "epochs", "valid_tokens", "memory_bytes")}


def memory_in_words(size: int) -> str:
    """Format bytes as `3.4 GB` or `120 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def after_first_step(config: Config, step: int, seconds: float, more_s: float = 0.0) -> str:
    """Estimate the remaining time and report the peak memory; every rank must call it.

    Args:
        config: the run's configuration.
        step: the step that was taken.
        seconds: seconds it took.
        more_s: seconds of the remaining validations and saves.
    """
    peak = torch.tensor(accelerator.peak_memory(), device=torch.cuda.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    left = config.train.steps - step
    rest = f"about {clock(left * seconds + more_s)} for the {left:,} left" if left else "it was the last"
    return f"step {step} took {seconds:.1f} s: {rest}; memory per rank: at most {memory_in_words(int(peak))}"
