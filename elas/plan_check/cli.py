"""`elas plan`: on paper, or with `--measure` and `--check` on this machine."""

import importlib

from elas.console import Heartbeat

MODES = {"--measure": "elas.plan_check.measure", "--check": "elas.plan_check.check"}


def main(argv: list[str]) -> int:
    """Run `elas plan ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    mode = next((flag for flag in MODES if any(word.split("=")[0] == flag for word in argv)), None)
    if mode is None:
        from elas.plan import cli

        return cli.main(argv)
    with Heartbeat(f"loading elas plan {mode}"):
        command = importlib.import_module(MODES[mode]).main
    return command(argv)
