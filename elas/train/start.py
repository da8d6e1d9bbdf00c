"""What a run says before its first step, and after it: the model, the kernel, the data, how long it will take."""

import torch
import torch.distributed as dist

from elas import host
from elas.config import Config
from elas.console import clock
from elas.data.batches import Datasets
from elas.model.provider import count_parameters
from elas.parallel import Layout
from elas.report import describe
from elas.train.engine import Engine


def model_line(config: Config, layout: Layout, engine: Engine) -> tuple[str, dict]:
    """The model and its layout, for people and as facts; every rank calls it."""
    parameters = count_parameters(engine.chunks)
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    ranks = f"TP {layout.tp} × PP {layout.pp} × DP {layout.dp}, ZeRO {engine.stage}{sequence}"
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
        chosen, why = choose(options, host.device(), dtype, config.sparsity.implementation)
        name = f"{chosen.ffn_memory} {chosen.name}"
    return f"FFN kernel: {name} ({why})", {"kernel": name, "kernel_why": why}


def data_line(config: Config, datasets: Datasets) -> str:
    """What there is to train on, how many times over the run will see it, and what validation reads."""
    samples = config.train.steps * config.train.global_batch_size
    length = config.model.seq_length
    of = f"{length:,} tokens" if config.data.packing == "packed" else f"up to {length:,} tokens"
    sizes = datasets.epoch_samples()
    drawn = datasets.samples_by_source(samples) or dict.fromkeys(sizes, samples)
    epochs = [f"{drawn[source] / size:.3g}" for source, size in sizes.items()]
    passes = f"{epochs[0]} epochs" if len(epochs) == 1 else f"epochs of its sources: {', '.join(epochs)}"
    line = f"data: {sum(sizes.values()):,} samples of {of}; {config.train.steps:,} steps take {samples:,}: {passes}"
    if datasets.valid is None:
        return f"{line}; no validation"
    return f"{line}; validation: {len(datasets.valid):,} samples"


def memory_in_words(size: int) -> str:
    """Bytes as `3.4 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def after_first_step(config: Config, step: int, seconds: float) -> str:
    """How long the rest will take, and how much memory a step took; every rank calls it.

    Args:
        config: the run's.
        step: the step that was taken.
        seconds: what it took.
    """
    peak = torch.tensor(host.peak_memory(), device=torch.cuda.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    left = config.train.steps - step
    rest = f"about {clock(left * seconds)} for the {left:,} left" if left else "it was the last"
    return f"step {step} took {seconds:.1f} s: {rest}; memory of a rank: {memory_in_words(int(peak))} at most"
