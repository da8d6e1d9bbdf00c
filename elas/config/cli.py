"""`elas config`: explain the settings."""

import dataclasses
import difflib
import textwrap

import yaml

from elas.command import Parser
from elas.config.catalogue import Key, catalogue, section_help
from elas.config.hints import likely_keys
from elas.config.reading import presets
from elas.config.schema import SECTIONS
from elas.errors import UserError
from elas.files import write_json


def main(argv: list[str]) -> int:
    """Run `elas config` with the arguments `argv`; returns 0, or raises `UserError` (no such section or key)."""
    parser = Parser(
        "elas config",
        "Explain settings: a section, a key, or all. `elas train … --show-config` prints those of a run.",
        "elas config sparsity.dense_steps",
    )
    parser.add_argument("what", nargs="*", metavar="SECTION or KEY", help="default: every key")
    known = catalogue()
    options = parser.parse_args(
        [word.removeprefix("--") if word.removeprefix("--") in known else word for word in argv]
    )
    keys = [key for word in options.what or SECTIONS for key in _named(word)]
    section = ""
    for key in keys:
        if key.key.split(".")[0] != section:
            if section:
                print()
            section = key.key.split(".")[0]
            print(f"{section}: {section_help(section)}")
        print("\n".join(_lines(key)))
    write_json(options.json, {"keys": [dataclasses.asdict(key) for key in keys]})
    return 0


def _named(word: str) -> list[Key]:
    """The keys of a section, a single key, or all keys of that name in any section."""
    known = catalogue()
    place = 0 if word in SECTIONS else 1
    found = [key for name, key in known.items() if word in (name, name.split(".")[place])]
    if not found:
        near = likely_keys(word) or difflib.get_close_matches(word, SECTIONS, n=1)
        if word in presets():
            raise UserError(f"elas config {word}: a preset; elas train --config {word} --show-config prints it")
        fix = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(SECTIONS)}"
        raise UserError(f"elas config {word}: no such section or key; {fix}")
    return found


def _lines(key: Key) -> list[str]:
    default = yaml.safe_dump(key.default, default_flow_style=True).split("\n")[0].removesuffix("...").strip()
    facts = "; ".join(part for part in (key.type, key.range, f"default {default}") if part)
    text = textwrap.wrap(key.help, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {key.key.split('.')[1]}  ({facts})", *text]
