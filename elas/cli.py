"""The `elas` command: dispatches to the sub-commands, and turns errors into one line and an exit status.

Each command is a function `main(argv) -> int` next to the code it runs. Its module is imported only when the command is
chosen, so `elas --help` is fast. Exit status: 0 done, 2 user error (one line on stderr), 1 everything else (traceback).
"""

import sys

from elas.command import end_process, exit_status, run_command

COMMANDS = {
    "quickstart": ("elas.quickstart", "corpus → tokenizer → tokens → 2-rank training → evaluation → report"),
    "train": ("elas.launch.pretrain", "one training run; several ranks when started by a launcher"),
    "watch": ("elas.watch.cli", "how runs stand, from their files alone: on this host or another"),
    "config": ("elas.config.cli", "what a setting means: `config`, `config SECTION`, `config KEY`"),
    "plan": ("elas.plan_check.cli", "layouts, memory and time of a run on a number of GPUs; checked by real steps"),
    "report": ("elas.report.cli", "one HTML page about a run, or several beside each other"),
    "launch": ("elas.launch.cli", "start a run: `launch local`, `ssh`, `slurm`; check hosts: `launch check`"),
    "checkpoint": (
        "elas.checkpoint.cli",
        "checkpoints of a run: `checkpoint list`, `verify`, `info`, `export`, `import`",
    ),
    "generate": ("elas.generate.cli", "text from a run, a checkpoint or an exported folder"),
    "eval": ("elas.launch.evaluate", "loss, perplexity and bits per byte of a checkpoint or a Hugging Face folder"),
    "export": ("elas.export.cli", "a checkpoint as a Hugging Face folder: `export hf`"),
    "import": ("elas.export.import_cli", "a Hugging Face folder as a run to train: `import hf`"),
    "doctor": ("elas.doctor.cli", "what this machine has and lacks for ELAS, each with a fix"),
    "build": ("elas.build", "compile the extensions for this machine ahead of time"),
    "tune": ("elas.bench.tune", "measure the tiles of the fused kernels on this GPU, and keep the fastest"),
    "bench": (
        "elas.bench.cli",
        "time and memory: `bench ffn`, `step`, `generate`, `comm`, `checkpoint`, `prep`",
    ),
    "gpu-check": ("elas.gpu_check.cli", "check a GPU in ten minutes: what is right, what is wrong, how fast it is"),
    "prep": ("elas.data_prep.cli", "prepare data: `prep tokenizer`, `tokenize`, `merge`, `verify`, `info`"),
}


def run(argv: list[str]) -> int:
    """Run one command.

    Args:
        argv: arguments after `elas`.

    Returns:
        The exit status.

    Raises:
        UserError: the command is unknown, or raises it.
    """
    if argv[:1] in (["-V"], ["--version"]):
        from elas import __version__

        print(f"elas {__version__}")
        return 0
    return run_command("elas", COMMANDS, argv, "example:", "  elas quickstart --steps 50")


def main() -> None:
    """Entry point of the `elas` console script."""
    end_process(exit_status(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
