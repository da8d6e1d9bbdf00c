"""Environment variables that are forwarded to other hosts, and the file that passes them to the deepspeed launcher.

ssh runs commands in the other host's own environment, and the deepspeed launcher forwards little more than `PYTHON*`.
Allow-list files name the other variables: a line is a name, a pattern (`NCCL_*`), or `NAME=VALUE`. A `#` at the start
of a line or after a space starts a comment.
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
}  # never forwarded: they belong to this launch, not to the run
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"[A-Za-z_*?][A-Za-z0-9_*?]*")


def forwarded(files: list[Path], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that the shipped allow-list and `files` select, sorted by name.

    Args:
        files: further allow-lists; later lines override earlier ones.
        environment: where names and patterns are looked up; None for this process's environment.

    Raises:
        UserError: a file cannot be read, or a line is malformed.
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
            raise UserError(f"{where}: {name!r} is not a variable name; write NAME=VALUE")
        return {name: value}
    if line and not _PATTERN.fullmatch(line):
        fix = "write NAME, a pattern such as NCCL_*, or NAME=VALUE"
        raise UserError(f"{where}: {line!r} is not a variable name; {fix}")
    return {name: value for name, value in environment.items() if line and fnmatchcase(name, line)}


def deepspeed_environment(variables: dict[str, str]) -> str:
    """The text of a `DS_ENV_FILE` with which all values arrive unchanged.

    The deepspeed launcher strips a value and puts it in double quotes if it holds special characters. pdsh then expands
    `%` sequences, and the shell on the other host expands the rest once.

    Raises:
        UserError: a value has a line break, or white space at its ends, which the launcher cannot forward.
    """
    lines = []
    for name, value in variables.items():
        if value != value.strip() or re.search(r"[\x00-\x1f\x7f]", value):
            why = "values with line breaks, or white space at their ends, cannot be forwarded"
            fix = "remove it from the allow-list, or set it on the hosts themselves"
            raise UserError(f"{name}={value!r}: {why}; {fix}")
        lines.append(f"{name}={_escaped(value)}\n")
    return "".join(lines)


def deepspeed_argument(argument: str) -> str:
    """Quote an argument of the training script for the deepspeed launcher, so that it arrives unchanged over pdsh.

    The launcher puts an argument with a space in double quotes, escaping its double quotes, and passes on all others
    unquoted.
    """
    if re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", argument):
        return argument
    escaped = _escaped(argument)
    return escaped.replace('\\"', '"') if " " in argument else f'"{escaped}"'


def _escaped(text: str) -> str:
    """Escape text for a shell's double quotes, and `%` for pdsh."""
    return re.sub(r'([$`"\\])', r"\\\1", text).replace("%", "%%")
