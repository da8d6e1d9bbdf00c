"""Explains why a host did not answer, from the messages of ssh, srun or its shell, and how to fix it."""

from elas.launch.preflight.channels import NO_FOLDER, NO_PYTHON, NoAnswer
from elas.launch.preflight.compare import Problem, Wanted


def unanswered(host: str, said: NoAnswer, wanted: Wanted, kind: str) -> Problem:
    """The problem of a host that did not answer.

    Args:
        host: the host.
        said: its exit status and error output.
        wanted: what the run requires.
        kind: how the host was reached: `ssh`, `srun` or `here`.
    """
    last = (said.error.splitlines() or ["no reason given"])[-1]
    last, folder, python = last.removeprefix("ssh: ").strip()[:160], wanted.folder, wanted.python
    if kind == "ssh" and said.status == 255:
        return _unreached(host, last)
    if said.status is None:
        fix = f"check that {'srun' if kind == 'srun' else 'ssh'} reaches it, and whether the host is overloaded"
        return Problem(host, "reachable", "no answer", "it did not answer in time", fix)
    if said.status == NO_FOLDER:
        fix = "start in a folder that every host has at the same path, such as a shared one"
        return Problem(host, "folder", folder, "no such folder there", fix)
    if said.status == NO_PYTHON:
        fix = "install the same environment at the same path, or on a shared folder"
        return Problem(host, "python", python, "no such Python there", fix)
    if "No module named" in said.error:
        fix = f"install it there too: {python} -m pip install elas"
        return Problem(host, "elas", python, f"elas cannot be imported ({last.rpartition(': ')[2]})", fix)
    if kind == "srun" and last.startswith("srun:"):
        return Problem(host, "reachable", "srun fails", last, "check that srun hostname works in this allocation")
    fix = f"run this there: {python} -m elas.launch.preflight.probe < /dev/null"
    return Problem(host, "python", python, f"ended with status {said.status} ({last})", fix)


def _unreached(host: str, last: str) -> Problem:
    """The problem that ssh's last line `last` describes."""
    fixes = {
        "Could not resolve": ("no such host", "fix the name in the hostfile, or add it to /etc/hosts"),
        "Permission denied": ("ssh login refused", f"install a key without a password: ssh-copy-id {host}"),
        "verification failed": ("its host key is not known", f"log in once by hand: ssh {host}"),
        "Connection refused": ("no ssh server", "start sshd there, or give its port in ELAS_SSH_ARGS='-p N'"),
        "timed out": ("does not answer", "check that the host is up and its network connected"),
        "No route": ("does not answer", "check that the host is up and its network connected"),
    }
    for words, (value, fix) in fixes.items():
        if words in last:
            return Problem(host, "reachable", value, last, fix)
    return Problem(host, "reachable", "ssh fails", last, f"check that this works: ssh -o BatchMode=yes {host} true")
