"""ssh commands that never prompt and notice a dead connection."""

import os
import shlex
import subprocess

from elas.errors import UserError

OPTIONS = [
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=4",
]  # fmt: skip
"""Without keep-alives ssh waits forever on a host whose network is down; with these it ends within 20 s."""
MORE = "ELAS_SSH_ARGS"
"""Environment variable with further options, quoted as for a shell: `-p 2222 -i key`."""


def ssh_command(host: str, command: list[str], *, program: str = "ssh") -> list[str]:
    """The command line that runs `command` on `host`, its words quoted so that they arrive unchanged.

    Raises:
        UserError: ELAS_SSH_ARGS has an unbalanced quote.
    """
    try:
        more = shlex.split(os.environ.get(MORE, ""))
    except ValueError as error:
        raise UserError(f"{MORE}={os.environ[MORE]!r}: {error}; fix the quotes") from None
    return [program, *OPTIONS, *more, host, shlex.join(command)]


def run_on(host: str, command: list[str], *, timeout_s: float) -> str:
    """The output of a command on `host`; empty if it fails or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(ssh_command(host, command), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
