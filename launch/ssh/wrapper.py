"""Called by pdsh in place of ssh: runs one host's part of a job below a guard there, and holds that guard's leash.

pdsh passes `-oConnectTimeout=… --user U --host H --node N WORDS…`, as `elas.launch.ssh.command` sets in
`PDSH_SSH_ARGS`. The words are the deepspeed launcher's command for that host. Heartbeats go over ssh's standard input;
orders are read from the launch's folder, and the host's status is written there (`elas.launch.guard.supervise`).
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from elas.launch.guard.guard import GRACE_S
from elas.launch.guard.processes import status_within
from elas.launch.ssh.remote import ssh_command

SIGN_S = 1.0
UNREACHABLE, NO_ELAS = 255, 97
_WHY = {
    UNREACHABLE: "the ssh connection failed or was lost: the host or its network is down, or it refused the login; "
    "or the guard of the job was killed there",
    127: "{python} does not exist there; every host needs the same Python at the same path",
    126: "{python} is not executable there",
    NO_ELAS: "elas cannot be imported with {python}; install it there too",
}


def remote_script(words: list[str], host: str, label: str, python: str) -> str:
    """The shell script that runs `words` below a guard."""
    guard = [python, "-m", "elas.launch.guard", "--leash", "--host", host, "--label", label]
    command = shlex.join(["sh", "-c", " ".join(_patched(words, python))])
    return (
        f"{shlex.quote(python)} -c 'import elas.launch.guard.guard' 2>/dev/null; s=$?; "
        f"case $s in 0) exec {shlex.join(guard)} -- {command};; 126|127) exit $s;; *) exit {NO_ELAS};; esac"
    )


def _patched(words: list[str], python: str) -> list[str]:
    """The deepspeed launcher's command with three changes for which it has no options.

    The folder's name is quoted; `exec` removes the shell between the guard and the launcher's part on a host; and that
    part logs no errors, since its only one repeats a failed rank's whole command line, and the guard reports the rank.
    """
    patched = []
    for word in words:
        if word.startswith("cd ") and word.endswith(";"):
            word = f"cd {shlex.quote(word[3:-1])};"
        elif word == python and "exec" not in patched:
            patched.append("exec")
        elif word == "deepspeed.launcher.launch":
            word = f"{word} --log_level=critical"
        patched.append(word)
    return patched


def main(argv: list[str]) -> int:
    """Run one host's part; returns its exit status."""
    parser = ArgumentParser(prog="ssh_wrapper", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for name in ("user", "host", "node"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("-o", action="append", help="options of ssh; ignored")
    parser.add_argument("words", nargs="...")
    options = parser.parse_args(argv)
    folder, python = Path(os.environ["ELAS_LAUNCH_DIR"]), os.environ["ELAS_PYTHON"]
    _put(folder, f"wrapper.{options.host}", str(os.getpid()))
    label = json.loads((folder / "hosts.json").read_text()).get(options.host, "its ranks")
    script = remote_script(options.words, options.host, label, python)
    command = ssh_command(options.host, ["sh", "-c", script], program=os.environ["ELAS_SSH"])
    status = _run(command, folder)
    if status in _WHY:
        print(f"error: {options.host} ({label}): {_WHY[status].format(python=python)}", file=sys.stderr, flush=True)
    _put(folder, f"status.{options.host}", str(status))
    return status


def _put(folder: Path, name: str, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the launch has ended and removed its folder
        (folder / f".{name}").write_text(text)
        (folder / f".{name}").replace(folder / name)


def _run(command: list[str], folder: Path) -> int:
    """Run ssh until it ends, and forward heartbeats and the launch's orders to the guard on the host."""
    launcher = int(os.environ["ELAS_LAUNCHER"])
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)  # writing to a dead connection would block
    given = ""
    while (status := status_within(process, SIGN_S)) is None:
        if not Path(f"/proc/{launcher}").exists():  # launcher and its guard are both dead, else this would be too
            process.stdin.close()  # tells the guard on the host to end its ranks
            return status_within(process, 2 * GRACE_S) or UNREACHABLE
        order = ""
        with contextlib.suppress(FileNotFoundError):
            order = (folder / "order").read_text()
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(process.stdin.fileno(), f"{order}\n".encode() if order != given else b"+\n")
            given = order
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
