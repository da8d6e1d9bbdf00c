"""The parts that all commands share: the parser, groups of sub-commands, and errors as one line and an exit status.

Each command is a function `main(argv) -> int` next to the code it runs. Exit status: 0 done, 2 user error (one line on
stderr), 1 everything else (traceback).
"""

import argparse
import atexit
import contextlib
import importlib
import json
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from elas.console import Heartbeat
from elas.errors import Failure, UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` for errors, adds `--json`, and ends its help with an example.

    Args:
        prog: the command as typed, `elas prep tokenize`.
        description: what it does, in one sentence.
        example: a working command line, shown at the end of `--help`.
        about: text of `--help` before the example.
    """

    def __init__(self, prog: str, description: str, example: str, *, about: str = ""):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{about}example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--json", metavar="FILE", type=Path, help="also write the results to FILE as JSON")

    def parse_args(self, args=None, namespace=None):
        """Parse arguments; raises `UserError` now, not after hours of work, for a `--json` that is not writable.

        Nor may it be an existing file of another kind.
        """
        parsed = super().parse_args(args, namespace)
        path = parsed.json
        if path is not None:
            parent = next(p for p in path.absolute().parents if p.exists())
            if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"--json {str(path)!r}: is a folder or cannot be written; give a file's path")
            if path.is_file() and not _may_be_results(path):
                raise UserError(f"--json {path}: exists and is not JSON, nothing is overwritten; give another file")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of printing the usage and exiting."""
        hint = None
        if found := _CHOICE.fullmatch(message):
            raise UserError(_choose(*found.groups()))
        if found := _INVALID.fullmatch(message):
            option, kind, value = found.groups()
            fix = f"give {_KINDS.get(kind, f'a valid {kind}')}"
            raise UserError(f"{option} {value.strip(chr(39))}: cannot be read; {fix}")
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split()
            hint = next((found for word in words if (found := self.meant(word))), None)
        raise UserError(f"{self.prog}: {message} ({f'{hint}; ' if hint else ''}see {self.prog} --help)")

    def meant(self, word: str) -> str | None:
        """A hint which option an unknown one may mean; None if there is no similar one."""
        return None


_CHOICE = re.compile(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)")
_INVALID = re.compile(r"argument (\S+): invalid (\w+) value: (.+)")
"""Messages of argparse."""
_KINDS = {"int": "a whole number", "float": "a number"}


def _choose(option: str, given: str, choices: str) -> str:
    """The error for a value that is no choice, with the one that may be meant."""
    from difflib import get_close_matches

    given, names = given.strip("'"), [name.strip("'") for name in choices.split(", ")]
    near = get_close_matches(given, names, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{option} {given}: unknown; give one of {', '.join(names)}{meant}"


def _may_be_results(path: Path) -> bool:
    """Whether a file is empty or one JSON object, unlike corpora, weights, JSONL and texts."""
    with path.open("rb") as file:
        start = file.read(1 << 26)
    if not start.strip():
        return True
    try:
        return start.lstrip()[:1] == b"{" and isinstance(json.loads(start), dict)
    except ValueError:
        return False


Commands = Mapping[str, tuple[Callable[[list[str]], int] | str, str]]
"""By name: a function of the arguments, or the name of a module with such a `main`; and its description."""


def run_command(prog: str, commands: Commands, argv: list[str], *more: str) -> int:
    """Run one command of a group such as `elas prep`.

    Args:
        prog: the group as typed.
        commands: of the group.
        argv: the command's name and its arguments.
        more: lines of `--help` below the commands.

    Returns:
        The exit status.

    Raises:
        UserError: the command is unknown, or raises it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
        lines += [f"  {name:<12} {what}" for name, (_, what) in commands.items()]
        print("\n".join([*lines, "", *more, "", f"`{prog} COMMAND --help` shows its options."]))
        return 0
    if argv[0] not in commands:
        from difflib import get_close_matches

        near = get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see {prog} --help"
        raise UserError(f"{prog}: unknown command {argv[0]!r}; {hint}")
    function = commands[argv[0]][0]
    if isinstance(function, str):
        with Heartbeat(f"loading {prog} {argv[0]}"):
            function = importlib.import_module(function).main
    return function(argv[1:])


def exit_status(function, argv: list[str]) -> int:
    """Call `function(argv)` and translate its exceptions.

    `UserError` → one line and 2; `Failure`, or `FloatingPointError` from training → one line and 1; Ctrl-C → 130;
    output into a closed pipe → 141, without a message. A torch that cannot be imported, and a working folder that is
    gone, are one line and 1.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _print_error(Failure("the working folder was deleted; cd to one that exists"))
        return 1
    try:
        return function(argv)
    except UserError as error:
        _print_error(error)
        return 2
    except (FloatingPointError, Failure) as error:
        _print_error(error)
        return 1
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141  # a shell's status for a process killed by SIGPIPE
    except (ImportError, OSError) as error:
        if not _torch_failed(error):
            raise
        line = str(error).strip().partition("\n")[0]
        _print_error(Failure(f"torch cannot be imported: {line}; see elas doctor"))
        return 1


def _torch_failed(error: Exception) -> bool:
    """Whether it is from `import torch`: not there, or for other libraries than this machine's."""
    if "torch" in sys.modules:  # Python drops a module whose import failed
        return False
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "torch" in modules or getattr(error, "name", None) == "torch"


def _output_is_closed() -> bool:
    """Whether the reader of stdout, such as `head`, has exited; if so, further output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False  # the error is from another pipe or socket
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _print_error(error: Exception) -> None:
    """Print one line on stderr, from one process per machine.

    All ranks of a machine (after the rendezvous, all ranks of the run) find the same error. The ranks that do not print
    it wait 2 s: launchers end the whole job when the first rank ends, and the line must be printed before.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    first = not (local_rank.isdecimal() and int(local_rank) > 0)
    if first or not getattr(error, "on_every_rank", True):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)


def end_process(status: int) -> NoReturn:
    """End this process with `status`; if it has used process groups, without running C++'s static destructors.

    With gloo's threads these destructors sometimes abort ("terminate called without an active exception", about one
    exit in sixty with two ranks), and a launcher would report a completed run as failed. Python's exit handlers run.
    """
    if "elas.parallel" not in sys.modules:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
