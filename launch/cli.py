"""`elas launch`: dispatches to its sub-commands; each is a module with a `main(argv)`."""

from elas.command import run_command


def main(argv: list[str]) -> int:
    """Run `elas launch ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    return run_command("elas launch", COMMANDS, argv, "example:", "  elas launch local --ranks 2 --config 60m …")


COMMANDS = {
    "local": ("elas.launch.local", "ranks on this machine, with the deepspeed launcher or torchrun"),
    "ssh": ("elas.launch.ssh.command", "ranks on the hosts of a hostfile, with the deepspeed launcher over pdsh"),
    "slurm": ("elas.launch.slurm.submit", "a SLURM job that saves at its time limit and queues itself again"),
    "check": ("elas.launch.preflight.check", "check whether hosts are fit for a run, before starting one"),
}
