"""Write a configuration as commented YAML that reads back as the same configuration."""

import textwrap
from typing import Any

import yaml

from elas.config.catalogue import catalogue, section_help
from elas.config.reading import parse_yaml
from elas.config.schema import Config

WIDTH = 110


def to_yaml(config: Config) -> str:
    """All sections and keys with their values, each below a comment with meaning, range and default.

    Returns:
        Text that `elas.config.load_config` reads back to an equal configuration.
    """
    lines = ["# `elas train --config FILE` reads this; `elas config KEY` explains a key."]
    section = ""
    for key in catalogue().values():
        here, name = key.key.split(".")
        if here != section:
            section = here
            lines += ["", *_comment(section_help(section), ""), f"{section}:"]
        value = getattr(getattr(config, section), name)
        default = "" if value == key.default else f"default {_value(key.default)}"
        facts = "; ".join(part for part in (key.range, default) if part)
        lines += [*_comment(f"{key.help} [{facts}]", "  "), f"  {name}: {_value(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_quoted(str(one)) for one in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    try:
        plain = parse_yaml(value) == value and yaml.safe_load(f"a: {value}") == {"a": value}
    except (yaml.YAMLError, RecursionError, ValueError):  # ValueError: an impossible date
        plain = False
    return value if plain else _quoted(value)


def _quoted(text: str) -> str:
    """A YAML string in double quotes, always on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31).strip()
