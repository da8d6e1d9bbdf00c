"""What a run says before its first step, and after it: the model, the kernel, the data, how long it will take."""

import torch
import torch.distributed as dist

from elas import accelerator
from elas.config import Config
from elas.config.describe import describe, describe_layout
from elas.console import clock
from elas.engine.engine import Engine
from elas.model.provider import count_parameters
from elas.parallel import Layout
from elas.plan.run import run_facts


def model_line(config: Config, layout: Layout, engine: Engine) -> tuple[str, dict]:
    """The model and its layout, for people and as facts; every rank calls it."""
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
    return line, {"parameters": parameters, "world_size": layout.world, "layout": ranks}


def kernel_line(config: Config) -> tuple[str, dict]:
    """Which implementation computes the FFN's core, and why that one."""
    if config.model.activation != "relu2":
        name, why = "torch", "a gated FFN has no kernel of its own"
    else:
        from elas.kernels.relu2_24 import Relu24Options
        from elas.kernels.relu2_24.registry import choose

        options = Relu24Options.of(config.sparsity, sparse=True)
        dtype = getattr(torch, config.train.dtype)
        chosen, why = choose(options, accelerator.device(), dtype, config.sparsity.implementation)
        name = f"{chosen.ffn_memory} {chosen.name}"
    return f"FFN kernel: {name} ({why})", {"kernel": name, "kernel_why": why}


def data_line(config: Config, layout: Layout, step: int) -> tuple[str, dict]:
    """What the run reads, how many times over, and about how much memory it takes: as `elas train --dry-run` says it.

    Args:
        config: the run's.
        layout: of its ranks.
        step: steps taken before this start.
    """
    facts = run_facts(config, layout.world, step)
    of = f"{facts['epochs']:.3g} epochs of {facts['corpus_tokens']:,}"
    if len(facts["sources"]) > 1:
        of += " (" + ", ".join(f"{one['prefix']} {one['epochs']:.3g}" for one in facts["sources"]) + ")"
    valid = f"{facts['valid_tokens']:,} tokens" if facts["valid_tokens"] else "off"
    memory = memory_in_words(facts["memory_bytes"])
    data = f"{facts['tokens']:,} tokens in {config.train.steps:,} steps: {of}"
    line = f"{data}; validation: {valid}; memory of a rank: about {memory}"
    return line, {key: facts[key] for key in ("tokens", "epochs", "valid_tokens", "memory_bytes")}


def memory_in_words(size: int) -> str:
    """Bytes as `3.4 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def after_first_step(config: Config, step: int, seconds: float, more_s: float = 0.0) -> str:
    """How long the rest will take, and how much memory a step took; every rank calls it.

    Args:
        config: the run's.
        step: the step that was taken.
        seconds: what it took.
        more_s: what the validations and saves that are still to come will take.
    """
    peak = torch.tensor(accelerator.peak_memory(), device=torch.cuda.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    left = config.train.steps - step
    rest = f"about {clock(left * seconds + more_s)} for the {left:,} left" if left else "it was the last"
    return f"step {step} took {seconds:.1f} s: {rest}; memory of a rank: {memory_in_words(int(peak))} at most"
