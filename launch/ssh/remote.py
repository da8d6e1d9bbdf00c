"""Calling ssh: never a question at a prompt, never a connection that is dead and nobody knows."""

import os
import shlex
import subprocess

from elas.errors import UserError

OPTIONS = [
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=4",
]  # fmt: skip
"""Without keep-alives ssh waits for ever on a host whose network is gone; with these it ends within 20 s."""
MORE = "ELAS_SSH_ARGS"
"""Variable with further options, as a shell would read them: `-p 2222 -i key`."""


def ssh_command(host: str, command: list[str], *, program: str = "ssh") -> list[str]:
    """What runs `command` on `host`, its words arriving as they are.

    Raises:
        UserError: ELAS_SSH_ARGS has a quote too many.
    """
    try:
        more = shlex.split(os.environ.get(MORE, ""))
    except ValueError as error:
        raise UserError(f"{MORE}={os.environ[MORE]!r}: {error}; mend the quotes") from None
    return [program, *OPTIONS, *more, host, shlex.join(command)]


def run_on(host: str, command: list[str], *, timeout_s: float) -> str:
    """What a command prints on `host`; empty where it fails, or does not end in time."""
    try:
        done = subprocess.run(ssh_command(host, command), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
