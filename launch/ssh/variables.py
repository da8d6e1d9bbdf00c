"""Which environment variables travel to other hosts, and the file in which the deepspeed launcher takes them.

ssh starts a command with the other host's own environment, and the deepspeed launcher adds little more than `PYTHON*`.
What else a run needs is named in allow-list files: a line is a name, a pattern (`NCCL_*`), or `NAME=VALUE`; what
follows a `#` that stands first on a line or after a space is a comment.
"""

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from elas.errors import UserError

SHIPPED = "ssh/environment.txt"
_OURS = {
    "ELAS_GUARD",
    "ELAS_GUARD_FAILED",
    "ELAS_LAUNCH_DIR",
    "ELAS_LAUNCHER",
    "ELAS_PYTHON",
    "ELAS_SSH",
    "ELAS_SSH_ARGS",
}  # of this launch, not of the run
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"[A-Za-z_*?][A-Za-z0-9_*?]*")


def travelling(files: list[Path], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that the shipped list and `files` let through.

    Args:
        files: allow-lists; a later line wins.
        environment: where names and patterns are looked up; None for this process's.

    Raises:
        UserError: a file that cannot be read, or a line of another form.
    """
    environment = os.environ if environment is None else environment
    texts = [(SHIPPED, (resources.files("elas.launch") / SHIPPED).read_text())]
    for path in files:
        try:
            texts.append((str(path), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--env-file {path}: cannot be read ({getattr(error, 'strerror', 'no text')})") from None
    found: dict[str, str] = {}
    for source, text in texts:
        for number, line in enumerate(text.splitlines(), 1):
            found |= _of_line(line, f"--env-file {source}: line {number}", environment)
    return {name: value for name, value in sorted(found.items()) if name not in _OURS}


def _of_line(line: str, where: str, environment: Mapping[str, str]) -> dict[str, str]:
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    name, equals, value = line.partition("=")
    if equals:
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no variable's name; write NAME=VALUE")
        return {name: value}
    if line and not _PATTERN.fullmatch(line):
        raise UserError(f"{where}: {line!r} is no variable's name; write NAME, a pattern such as NCCL_*, or NAME=VALUE")
    return {name: value for name, value in environment.items() if line and fnmatchcase(name, line)}


def deepspeed_environment(variables: dict[str, str]) -> str:
    """The text of a `DS_ENV_FILE` that gives every variable its value, to the letter.

    The deepspeed launcher strips a value and puts it in double quotes when it holds anything special; the shell of the
    other host reads it once, after pdsh has taken every `%` for one of its own.

    Raises:
        UserError: a line break, or white space at an end of a value, which the launcher cannot carry.
    """
    lines = []
    for name, value in variables.items():
        if value != value.strip() or re.search(r"[\x00-\x1f\x7f]", value):
            fix = "take it out of the allow-list, or set it on the hosts themselves"
            raise UserError(f"{name}={value!r}: line breaks and white space at the ends do not survive; {fix}")
        lines.append(f"{name}={_escaped(value)}\n")
    return "".join(lines)


def deepspeed_argument(argument: str) -> str:
    """An argument of the training script as the deepspeed launcher must be given it, to arrive as it is over pdsh.

    The launcher puts one with a space in double quotes, with its own double quotes escaped, and hands on all others
    bare.
    """
    if re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", argument):
        return argument
    escaped = _escaped(argument)
    return escaped.replace('\\"', '"') if " " in argument else f'"{escaped}"'


def _escaped(text: str) -> str:
    """For between double quotes, and for pdsh."""
    return re.sub(r'([$`"\\])', r"\\\1", text).replace("%", "%%")
