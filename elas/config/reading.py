"""Read settings from YAML files, presets and `--section.key value`; every error is one line with key, value and fix."""

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from elas.config.hints import unknown_key, wrong_type
from elas.config.kinds import name_of, parts_of, plain
from elas.config.schema import KEYS, OWN_SETTINGS, SECTIONS, Config, OptimizerConfig, field_type
from elas.config.shares import resolve_shares
from elas.errors import ConfigError, UserError


class _Loader(yaml.SafeLoader):
    """YAML with the number rules of YAML 1.2: `2:4` is text (base 60 in YAML 1.1) and `1e-3` is a number."""

    def construct_mapping(self, node, deep=False):
        """Raise for duplicate keys, as YAML 1.2 requires; PyYAML silently keeps the last value."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"the key in line {line} is not text")
            if key.value in seen:
                mark = f"line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice, the second in {mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML with the rules of `_Loader`; raises `yaml.YAMLError` or RecursionError."""
    return yaml.load(text, _Loader)


def presets() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("elas.presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def read_yaml(source: str) -> dict[str, Any]:
    """Read a YAML file, or a shipped preset by its name (`60m`), into values by dotted key.

    A top-level `base: NAME` starts from that preset or file (relative to the file that names it) and overrides the keys
    given here: an empty section changes nothing, a list replaces a list, `null` is a value.

    Raises:
        UserError: missing file, invalid YAML, unknown sections or keys, or circular bases.
    """
    return _with_base(source, ())


def _with_base(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    values, folder = _read_one(source)
    if "base" not in values:
        return flatten(values)
    base = values.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError("base", base, f"in {source} is not a file name", "give a YAML file or a preset, or remove it")
    path = folder / base
    base = str(path.resolve()) if path.is_file() else base
    if base in (*seen, source, str(Path(source).resolve())):
        raise ConfigError("base", base, f"in {source} is circular", "remove it")
    # Merged by key, not by section: an empty section (`model:`) must not hide the base's.
    return laid_over(_with_base(base, (*seen, source)), flatten(values))


_RATE = "optimizer.lr"


@dataclass(frozen=True)
class _Former:
    """Stands for a learning rate that was given for another optimizer, until a later layer gives one."""

    rate: Any
    optimizer: str


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` in place of `below`, by dotted key.

    Another `optimizer.kind` leaves out what only the former has, and neither it nor another `optimizer.normalize` takes
    over the former's learning rate: `from_flat` raises if nothing above gives one.
    """
    before, after = (one.get("optimizer.kind", OptimizerConfig.kind) for one in (below, {**below, **above}))
    left_out = OWN_SETTINGS.get(before, ()) if isinstance(before, str) and after != before else ()
    names = {f"optimizer.{name}" for name in left_out}
    found = {**{key: value for key, value in below.items() if key not in names}, **above}
    if _RATE in below and _RATE not in above:
        rate = below[_RATE] if isinstance(below[_RATE], _Former) else _Former(below[_RATE], _optimizer(below))
        found[_RATE] = rate.rate if rate.optimizer == _optimizer(found) else rate
    return found


def _optimizer(flat: dict[str, Any]) -> str:
    """What rates are of: `adamw`, `muon with normalize=spectron`."""
    kind, key = flat.get("optimizer.kind", OptimizerConfig.kind), "normalize"
    return (
        f"{kind} with {key}={flat.get(f'optimizer.{key}', OptimizerConfig.normalize)}" if kind == "muon" else f"{kind}"
    )


def _read_one(source: str) -> tuple[dict[str, Any], Path]:
    """The content of one file, and its folder (the current one for a preset)."""
    path = Path(source)
    folder = path.parent
    if not path.is_file() and source in presets():
        path, folder = resources.files("elas.presets") / f"{source}.yaml", Path()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("config", source, "is not UTF-8 text", "give a YAML file") from None
    except OSError as error:
        near = difflib.get_close_matches(source, presets(), n=1)
        fix = (
            f"did you mean the preset {near[0]!r}?" if near else f"give a YAML file or a preset: {', '.join(presets())}"
        )
        raise ConfigError("config", source, error.strerror or "cannot be read", fix) from None
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        fix = "indent with spaces, not tabs" if re.search(r"^ *\t", text, re.MULTILINE) else "fix the file"
        raise ConfigError("config", source, f"is not YAML ({error})", fix) from None
    if values is None:
        return {}, folder
    if not isinstance(values, dict):
        raise ConfigError(
            "config", source, "does not contain sections", "write `section:` and indented `key: value` lines"
        )
    return values, folder


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested sections to dotted keys. A section may be empty.

    Raises:
        ConfigError: an unknown key (with a suggestion), or a key given twice.
    """
    flat = {}
    for section, entries in values.items():
        if section in KEYS:
            _add(flat, section, entries)
        elif section not in SECTIONS:
            raise unknown_key(str(section), entries)
        elif entries is None:
            continue
        elif not isinstance(entries, dict):
            raise ConfigError(section, entries, "is a section, not a value", f"write {section}.KEY")
        else:
            for key, value in entries.items():
                if not isinstance(key, str):
                    fix = 'put text that contains commas in quotes, "99,1,0"'
                    raise ConfigError(f"{section}.{key}", value, "is not a setting's name", fix)
                if f"{section}.{key}" not in KEYS:
                    raise unknown_key(f"{section}.{key}", value)
                _add(flat, f"{section}.{key}", value)
    return flat


def _add(flat: dict[str, Any], key: str, value: Any) -> None:
    if key in flat:  # once under its section and once with dots: ambiguous
        raise ConfigError(key, value, f"is given twice, the other value is {flat[key]!r}", "remove one")
    flat[key] = value


def split_overrides(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Extract `--section.key value` and `--section.key=value` from an argument list.

    Args:
        argv: command-line arguments.

    Returns:
        Overrides by dotted key (values parsed as YAML, so `null` and `[a, b]` work), and the remaining arguments.

    Raises:
        UserError: an unknown key, or a key without a value.
    """
    settings, rest = split_settings(argv)
    parsed = {key: value if _is_text(key) and value != "null" else _parse_scalar(key, value) for key, value in settings}
    return parsed, rest


def split_settings(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Like `split_overrides`, with unparsed values.

    Raises:
        UserError: an unknown key, or a key without a value.
    """
    settings, rest, i = [], [], 0
    while i < len(argv):
        name, sep, value = argv[i].partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(argv[i])
            i += 1
            continue
        key = name[2:]
        if key not in KEYS:
            raise unknown_key(key, value if sep else (argv[i + 1] if i + 1 < len(argv) else ""))
        if not sep:
            i += 1
            if i >= len(argv) or argv[i].partition("=")[0].removeprefix("--") in KEYS:
                raise UserError(f"--{key}: no value follows; write --{key} VALUE")
            value = argv[i]
        settings.append((key, value))
        i += 1
    return settings, rest


def _is_text(key: str) -> bool:
    return parts_of(field_type(key)) == [str]


def _parse_scalar(key: str, value: str) -> Any:
    try:
        parsed = parse_yaml(value)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(key, value, "is not valid YAML", f"give {name_of(field_type(key))}") from None
    return value if isinstance(parsed, dict) else parsed


def from_flat(flat: dict[str, Any]) -> Config:
    """Build a `Config` from dotted keys; jsonargparse checks types, and shares of `train.steps` become steps.

    Raises:
        ConfigError: a value of the wrong type, or not one of the choices; a learning rate that `laid_over` left behind.
    """
    former = flat.get(_RATE)
    if isinstance(former, _Former):
        from_flat({**flat, _RATE: former.rate})  # mistakes in what was given come first
        why = f"is a rate of {former.optimizer}, and the optimizer is {_optimizer(flat)} now"
        raise ConfigError(_RATE, former.rate, why, f"give {_RATE} as well")
    built = {}
    for section, cls in SECTIONS.items():
        values = {k.split(".")[1]: _blend(v) for k, v in flat.items() if k.startswith(f"{section}.")}
        for name, value in values.items():
            _check_given(f"{section}.{name}", value)
        built[section] = cls(**_typed(section, values))
    config = Config(**built)
    resolve_shares(config)
    return config


def _typed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of one section, converted to their fields' types."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    for name in values:
        # Plain types only: `elas.config.rules` checks ranges, with better messages.
        parser.add_argument(f"--{name}", type=plain(field_type(f"{section}.{name}")))
    typed = {}
    for name, value in values.items():
        try:
            typed[name] = getattr(parser.parse_object({name: value}), name)
        except ArgumentError:
            raise wrong_type(f"{section}.{name}", value) from None
    return typed


def _check_given(key: str, value: Any) -> None:
    """Raise `ConfigError` for an empty value of a setting that requires one."""
    kind = field_type(key)
    optional = type(None) in parts_of(kind)
    if value is None and not optional:
        raise ConfigError(key, None, "has no value", f"give {name_of(kind)}, or remove the key")
    if value == "" and str in parts_of(kind):
        raise ConfigError(key, "", "is empty", "give a text" + (" or null" if optional else ""))


def _blend(value: Any) -> Any:
    """Convert the numbers of a blend `[0.7, A, 0.3, B]` to strings, as the field requires."""
    return [str(v) for v in value] if isinstance(value, list) else value


def load_config(source: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a configuration.

    Args:
        source: YAML file or preset name; None for the defaults.
        overrides: values by dotted key, which take precedence over the file.

    Returns:
        The typed configuration (not yet validated against a world size; see `elas.config.rules`).

    Raises:
        ConfigError: one line naming key, value and fix.
    """
    flat = read_yaml(source) if source else {}
    return from_flat(laid_over(flat, flatten(overrides or {})))
