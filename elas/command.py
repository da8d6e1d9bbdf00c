"""What every command is made of: its parser, groups of sub-commands, and mistakes as one line and an exit status.

Each command lives beside the code it drives, as a function `main(argv) -> int`. Exit status: 0 done, 2 the user's
mistake (one line on stderr), 1 everything else (traceback).
"""

import argparse
import atexit
import contextlib
import importlib
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from elas.console import Heartbeat
from elas.errors import Failure, UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError` and whose help ends in an example.

    Args:
        prog: the command as typed, `elas prep tokenize`.
        description: what it does, one sentence.
        example: a command line that works, shown at the end of `--help`.
        about: lines of `--help` before the example.
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
        """Parse, and refuse a `--json` that could not be written before hours of work end in it."""
        parsed = super().parse_args(args, namespace)
        path = parsed.json
        if path is not None:
            there = next(p for p in path.absolute().parents if p.exists())
            if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
                raise UserError(f"--json {str(path)!r}: is a folder or cannot be written; give a file's path")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        hint = None
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split()
            hint = next((found for word in words if (found := self.meant(word))), None)
        raise UserError(f"{self.prog}: {message} ({f'{hint}; ' if hint else ''}see {self.prog} --help)")

    def meant(self, word: str) -> str | None:
        """What an unknown option may stand for, as a hint; None when nothing is near."""
        return None


def run_command(prog: str, commands: dict[str, tuple[Callable | str, str]], argv: list[str], *more: str) -> int:
    """Run one command of a group such as `elas prep`.

    Args:
        prog: the group as typed.
        commands: by name, a function of the arguments (or a module whose `main` is one), and what it does.
        argv: the command's name and its arguments.
        more: lines of `--help` below the commands.

    Returns:
        The exit status.

    Raises:
        UserError: no such command, or whatever it finds wrong.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
        lines += [f"  {name:<12} {what}" for name, (_, what) in commands.items()]
        print("\n".join([*lines, "", *more, "", f"`{prog} COMMAND --help` says more."]))
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

    `UserError` → one line and 2; `Failure`, or numbers that blew up in training → one line and 1; Ctrl-C → 130;
    output into a pipe that is closed → 141, without a word.
    """
    try:
        return function(argv)
    except UserError as error:
        _tell(error)
        return 2
    except (FloatingPointError, Failure) as error:
        _tell(error)
        return 1
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141  # what a process ended by SIGPIPE has in a shell


def _output_is_closed() -> bool:
    """Whether the reader of stdout, such as `head`, has gone; what is left to print then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False  # a connection of another kind broke
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _tell(error: Exception) -> None:
    """One line on stderr from one process of each machine.

    Before they have met, all ranks of a machine find the same mistake; after, all ranks of the run. The others wait a
    moment: launchers end the whole job when its first rank ends, and the line must be out by then.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    first = not (local_rank.isdecimal() and int(local_rank) > 0)
    if first or not getattr(error, "on_every_rank", True):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)


def end_process(status: int) -> NoReturn:
    """End this process with `status`; after process groups, without C++'s static destructors.

    Those of gloo's threads abort now and then ("terminate called without an active exception", one exit in about sixty
    of two ranks), and a launcher would report a finished run as failed. Python's own exit handlers run.
    """
    if "elas.parallel" not in sys.modules:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
