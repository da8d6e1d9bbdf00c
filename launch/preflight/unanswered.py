"""Why a host did not answer: from what ssh, srun or its shell said of it, with what to do."""

from elas.launch.preflight.channels import NO_FOLDER, NO_PYTHON, NoAnswer
from elas.launch.preflight.compare import Problem, Wanted


def unanswered(host: str, said: NoAnswer, wanted: Wanted, kind: str) -> Problem:
    """Why a host did not answer.

    Args:
        host: which.
        said: what is known of it.
        wanted: what was asked for.
        kind: how it was asked: `ssh`, `srun` or `here`.
    """
    last = (said.error.splitlines() or ["no reason given"])[-1]
    last, folder, python = last.removeprefix("ssh: ").strip()[:160], wanted.folder, wanted.python
    if kind == "ssh" and said.status == 255:
        return _unreached(host, last)
    if said.status is None:
        fix = f"see whether {'srun' if kind == 'srun' else 'ssh'} gets there, and what keeps the host so busy"
        return Problem(host, "reachable", "no answer", "it did not answer in time", fix)
    if said.status == NO_FOLDER:
        fix = "start in a folder that every host has at the same path, such as a shared one"
        return Problem(host, "folder", folder, "there is no such folder", fix)
    if said.status == NO_PYTHON:
        fix = "install the same environment at the same path, or on a shared folder"
        return Problem(host, "python", python, "there is no such Python", fix)
    if "No module named" in said.error:
        fix = f"install it there as here: {python} -m pip install elas"
        return Problem(host, "elas", python, f"elas cannot be imported ({last.rpartition(': ')[2]})", fix)
    if kind == "srun" and last.startswith("srun:"):
        return Problem(host, "reachable", "srun fails", last, "see whether srun hostname works in this allocation")
    fix = f"see what this prints there: {python} -m elas.launch.preflight.probe < /dev/null"
    return Problem(host, "python", python, f"ended with status {said.status} ({last})", fix)


def _unreached(host: str, last: str) -> Problem:
    """What ssh says, and what to do."""
    fixes = {
        "Could not resolve": ("no such host", "mend the name in the hostfile, or add it to /etc/hosts"),
        "Permission denied": ("ssh is not let in", f"let a key in without a password: ssh-copy-id {host}"),
        "verification failed": ("its host key is not known", f"log in once by hand: ssh {host}"),
        "Connection refused": ("nothing listens for ssh", "start sshd there, or give its port in ELAS_SSH_ARGS='-p N'"),
        "timed out": ("does not answer", "see whether it is up and its network cable is in"),
        "No route": ("does not answer", "see whether it is up and its network cable is in"),
    }
    for words, (value, fix) in fixes.items():
        if words in last:
            return Problem(host, "reachable", value, last, fix)
    return Problem(host, "reachable", "ssh fails", last, f"see whether this works: ssh -o BatchMode=yes {host} true")
