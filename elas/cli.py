"""The `elas` command: finds the sub-command, runs it, and turns mistakes into one line and an exit status.

Each command lives beside the code it drives, as a function `main(argv) -> int`; this file only knows where. Modules are
imported when their command is chosen, so `elas --help` answers at once. Exit status: 0 done, 2 the user's mistake
(one line on stderr), 1 everything else (traceback).
"""

import sys

from elas.command import end_process, exit_status, run_command

COMMANDS = {
    "quickstart": ("elas.quickstart", "corpus → tokenizer → tokens → 2-rank training → evaluation → report"),
    "train": ("elas.launch.pretrain", "one training run; several ranks when started by a launcher"),
    "config": ("elas.config.cli", "what a setting means: `config`, `config SECTION`, `config KEY`"),
    "launch": ("elas.launch.cli", "start a run: `launch local`, `ssh`, `slurm`; are hosts fit: `launch check`"),
    "checkpoint": (
        "elas.checkpoint.cli",
        "what a run saved: `checkpoint list`, `verify`, `info`, `export`, `import`",
    ),
    "build": ("elas.build", "compile ahead of time what runs on this machine will need"),
    "bench": ("elas.bench.cli", "what things cost: `bench ffn`, `step`, `comm`, `checkpoint`, `prep`"),
    "prep": ("elas.data_prep.cli", "prepare data: `prep tokenizer`, `tokenize`, `merge`, `verify`, `info`"),
}


def run(argv: list[str]) -> int:
    """Run one command; raises what it raises.

    Args:
        argv: arguments after `elas`.

    Returns:
        The exit status.

    Raises:
        UserError: unknown command, or whatever the command finds wrong.
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
