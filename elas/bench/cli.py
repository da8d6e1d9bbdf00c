"""`elas bench`: runs one of the benchmarks."""

import itertools
import os
from collections.abc import Callable

from elas import accelerator
from elas.command import run_command

COMMANDS: dict[str, tuple[Callable | str, str]] = {
    "ffn": ("elas.bench.ffn", "feed-forward layer, forward and backward: full rank, low rank, 2:4"),
    "step": ("elas.bench.step", "whole training step, beside transformers' Llama"),
    "generate": ("elas.bench.generate", "prefill and decode: full rank, low rank, 2:4, beside transformers' Llama"),
    "comm": ("elas.bench.comm", "bytes sent within a tensor-parallel group by a layer"),
    "checkpoint": ("elas.bench.checkpoint", "synchronous and asynchronous saves: how long training waits"),
    "prep": ("elas.bench.prep", "tokenisation beside the libraries alone; memory, and resuming after kills"),
}


def main(argv: list[str]) -> int:
    """Run `elas bench ARGV…`; returns the exit status, raises `UserError` for invalid arguments."""
    if "--device=cpu" in argv or ("--device", "cpu") in itertools.pairwise(argv):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for GPUs: what is found then stays
    accelerator.prepare()  # before Megatron is imported: it silences what that says of packages that are not needed
    return run_command("elas bench", COMMANDS, argv, "example:", "  elas bench ffn --shapes 60m")
