"""All `elas` commands and their parsers, which are made without running a command."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

from elas import cli
from elas.command import Parser


class _Caught(BaseException):
    """Carries a parser out of the command that made it; no command catches it."""

    def __init__(self, parser: Parser):
        self.parser = parser


@dataclass(frozen=True)
class Command:
    """One command, `elas prep tokenize`.

    Attributes:
        words: as typed.
        summary: what the list of its group says of it.
        parser: its options.
        mode: an option that makes it another command with options of its own (`elas plan --check`); else empty.
    """

    words: tuple[str, ...]
    summary: str
    parser: Parser
    mode: str = ""

    @property
    def title(self) -> str:
        """The words in one, and the mode."""
        return " ".join([*self.words, self.mode]).strip()


@dataclass(frozen=True)
class Group:
    """A command as `elas --help` lists it, and what it consists of: itself alone, or its sub-commands."""

    name: str
    summary: str
    commands: tuple[Command, ...]


def groups() -> list[Group]:
    """Every command, in the order of `elas --help`.

    Raises:
        TypeError: a command does not make an `elas.command.Parser` first.
    """
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core, imported by some, tells of packages that are not needed
        for name, entry in cli.COMMANDS.items():
            found.append(Group(name, entry[1], tuple(_walk(("elas",), {name: entry}))))
    return found


def _walk(above: tuple[str, ...], commands) -> Iterator[Command]:
    for name, (main, summary) in commands.items():
        module = importlib.import_module(main) if isinstance(main, str) else None
        if below := getattr(module, "COMMANDS", None):
            yield from _walk((*above, name), below)
            continue
        function, words = (module.main if module else main), (*above, name)
        for mode in ("", *getattr(module, "MODES", ())):
            yield Command(words, summary, parser_of(function, words, [mode] if mode else []), mode)


def parser_of(main: Callable[[list[str]], int], words: tuple[str, ...], argv: list[str]) -> Parser:
    """The parser that a command makes before anything else, of its arguments `argv`."""

    def catch(self, args=None, namespace=None):
        raise _Caught(self)

    with mock.patch.object(Parser, "parse_args", catch):
        try:
            main(argv)
        except _Caught as caught:
            return caught.parser
    raise TypeError(f"{' '.join(words)}: does not parse its arguments by elas.command.Parser first")
