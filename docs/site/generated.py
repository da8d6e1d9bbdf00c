"""Reference pages made from the code: settings, presets, commands. Each raises for what has no description."""

import argparse
import json

from commands import Command, groups

from elas.config import Config, ffn_width, load_config, presets
from elas.config.catalogue import Key, catalogue, section_help
from elas.config.describe import describe
from elas.config.schema import SECTIONS


def configuration() -> str:
    """Every setting: type, default, range and meaning.

    Raises:
        KeyError, TypeError: a key without a description, or a number without a range (`elas.config.catalogue`).
        ValueError: a description of a key or a section is empty.
    """
    lines = [
        "# Configuration",
        "",
        "Every setting is a key `section.name` in a YAML file, and `--section.name VALUE` on the command line. "
        "`elas config`, `elas config SECTION` and `elas config KEY` show the same on a terminal; "
        "`elas train … --show-config` prints the settings of a run.",
        "",
    ]
    keys = catalogue().values()
    for section in SECTIONS:
        lines += [f"## {section} {{ #{section} }}", "", _described(section_help(section), section), ""]
        for key in keys:
            if key.key.startswith(f"{section}."):
                lines += _setting(key)
    return "\n".join(lines) + "\n"


def _setting(key: Key) -> list[str]:
    default = "null" if key.default is None else json.dumps(key.default)
    allowed = "" if key.range in ("", "true | false") else f" · {_escaped(key.range)}"
    facts = f"`{key.type}` · default `{default}`{allowed}"
    text = _escaped(_described(key.help, key.key))
    return [f"### {key.key} {{ #{key.key} }}", "", text, "", facts, "{ .facts }", ""]


def presets_page() -> str:
    """The shipped configurations."""
    lines = [
        "# Presets",
        "",
        "`--config NAME` reads one of these files of `elas/presets`; any key of it can be overridden. "
        "`NAME-loro` is trained with LORO as in the paper; `NAME-lowrank`, `NAME-cola` and `NAME-full` are the models "
        "that it is compared with.",
        "",
        "| preset | model (layers × hidden size) | FFN width | sequence | tokens a step | steps | optimizer, rate |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {name: load_config(name) for name in presets()}
    for name, config in sorted(found.items(), key=lambda one: one[1].model.num_layers * one[1].model.hidden_size ** 2):
        lines.append(f"| `{name}` | {' | '.join(_preset(config))} |")
    return "\n".join(lines) + "\n"


def _preset(config: Config) -> list[str]:
    tokens = config.train.global_batch_size * config.model.seq_length
    rate = f"{config.optimizer.kind}, {config.optimizer.lr:g}"
    numbers = (ffn_width(config), config.model.seq_length, tokens, config.train.steps)
    return [describe(config), *(f"{number:,}" for number in numbers), rate]


def commands_page() -> str:
    """Every command: usage, options and an example.

    Raises:
        ValueError: a command or an option without a description.
    """
    found = groups()
    lines = [
        "# Commands",
        "",
        "`elas COMMAND --help` shows the same on a terminal. Exit status: 0 done, 2 a user error (one line on "
        "standard error), 1 everything else; those of `elas launch` are in [Starting runs](../launch.md). "
        "Every command has `--json FILE`.",
        "",
        "| command | |",
        "|---|---|",
        *(f"| [`elas {group.name}`](#elas-{group.name}) | {_escaped(group.summary)} |" for group in found),
        "",
    ]
    for group in found:
        lines += [f"## elas {group.name}", ""]
        single = len(group.commands) == 1 and len(group.commands[0].words) == 2
        if not single:
            lines += [f"{_sentence(_described(group.summary, f'elas {group.name}'))}", ""]
        for command in group.commands:
            if not single:
                lines += [f"### {command.title}", ""]
            lines += _command(command)
    return "\n".join(lines) + "\n"


def _command(command: Command) -> list[str]:
    parser, name = command.parser, command.title
    usage = parser.format_usage().removeprefix("usage: ").rstrip().replace("\n       ", "\n")
    lines = [_sentence(_escaped(_described(parser.description, name))), "", "```text", usage, "```", ""]
    for group in parser._action_groups:
        actions = [one for one in group._group_actions if one.dest != "help" and one.help is not argparse.SUPPRESS]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            lines += [f"**{group.title}**", ""]
        kind = "option" if actions[0].option_strings else "argument"
        lines += [f"| {kind} | |", "|---|---|", *(_option(parser, action, name) for action in actions), ""]
    if isinstance(parser.epilog, str) and "settings:" in parser.epilog:
        lines += ["It takes settings as well: `--section.key VALUE` ([Configuration](configuration.md)).", ""]
    example = (parser.epilog or "").rpartition("example:\n")[2].strip()
    return [*lines, "```bash", _described(example, f"{name}, its example"), "```", ""]


def _option(parser: argparse.ArgumentParser, action: argparse.Action, name: str) -> str:
    formatter = parser._get_formatter()
    shown = ", ".join(action.option_strings)
    value = "" if action.nargs == 0 else formatter._format_args(action, _metavar(action))
    what = f"{name} {shown or action.dest}"
    text = formatter._expand_help(action) if action.help else ""
    option = f"{shown} {value}".strip().replace("|", "\\|")
    return f"| `{option}` | {_escaped(_described(text, what))} |"


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _described(text: str | None, what: str) -> str:
    if not (text or "").strip():
        raise ValueError(f"{what}: has no description; the documentation needs one")
    return (text or "").strip()


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", ":", "?")) else f"{text}."


def _escaped(text: str) -> str:
    """Text for a cell or a paragraph of Markdown; what is already `code` stays."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        for sign in "\\*_<|#[]":
            parts[i] = parts[i].replace(sign, f"\\{sign}")
    for i in range(1, len(parts), 2):
        parts[i] = parts[i].replace("|", "\\|")
    return "`".join(parts)


PAGES = {
    "reference/configuration.md": configuration,
    "reference/presets.md": presets_page,
    "reference/commands.md": commands_page,
}
"""By path in the documentation: the function that writes the page."""
