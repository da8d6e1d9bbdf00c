"""`elas bench`: finds the benchmark."""

from collections.abc import Callable

from elas.command import run_command

COMMANDS: dict[str, tuple[Callable | str, str]] = {
    "ffn": ("elas.bench.ffn", "feed-forward layer, forward and backward: full rank, low rank, 2:4"),
    "step": ("elas.bench.step", "whole training step, beside transformers' Llama"),
    "generate": ("elas.bench.generate", "prefill and decode: full rank, low rank, 2:4, beside transformers' Llama"),
    "comm": ("elas.bench.comm", "bytes that cross the tensor-parallel group in a layer"),
    "checkpoint": ("elas.bench.checkpoint", "saving in place and beside training: what waits, and for how long"),
    "prep": ("elas.bench.prep", "tokenisation beside the bare libraries; memory, and what kills cost"),
}


def main(argv: list[str]) -> int:
    """Run `elas bench ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    return run_command("elas bench", COMMANDS, argv, "example:", "  elas bench ffn --shapes 60m")
