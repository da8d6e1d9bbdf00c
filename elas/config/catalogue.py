"""Type, default, range and meaning of every key, derived from `elas.config.schema` alone.

`catalogue` raises for a key without a description and for a number without a range.
"""

import ast
import dataclasses
import functools
import inspect
import typing
from typing import Any, Literal

from elas.config import schema
from elas.config.kinds import Range, choices_of, parts_of, range_of


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        key: `section.name`.
        type: in Python's names, `int | null`.
        default: the schema's default.
        range: allowed values in words; "" if the type says it.
        help: meaning, in one or two sentences, with the unit.
    """

    key: str
    type: str
    default: Any
    range: str
    help: str


@functools.cache
def catalogue() -> dict[str, Key]:
    """All keys by name, in the order of the schema.

    Raises:
        TypeError: a number without a range.
        KeyError: a key without a description.
    """
    helps, found = _descriptions(), {}
    for section, cls in schema.SECTIONS.items():
        for field in dataclasses.fields(cls):
            key = f"{section}.{field.name}"
            kinds = parts_of(field.type)
            inside = [part for kind in kinds for part in typing.get_args(kind)]  # of a list
            if any(part in (int, float) for part in [*kinds, *inside]) and not isinstance(range_of(field.type), Range):
                raise TypeError(f"elas.config.schema: {key} is a number without a Range; see elas.config.kinds")
            text = helps[cls.__name__, field.name]
            make = field.default_factory  # of a list
            default = make() if callable(make) else field.default
            found[key] = Key(key, _type_name(kinds), default, _range_text(field.type), text)
    return found


def section_help(section: str) -> str:
    """A section's description in one sentence."""
    return " ".join((inspect.getdoc(schema.SECTIONS[section]) or "").split())


def _descriptions() -> dict[tuple[str, str], str]:
    """The string below each field by class and field, from the source: Python does not keep them at run time."""
    found = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)  # of a class's field
                    found[node.name, field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _type_name(kinds: list[Any]) -> str:
    def name(kind: Any) -> str:
        if typing.get_origin(kind) is Literal:
            return type(typing.get_args(kind)[0]).__name__
        if kind is type(None):
            return "null"
        return "list[str]" if typing.get_origin(kind) is list else kind.__name__

    return " | ".join(map(name, kinds))


def _range_text(kind: Any) -> str:
    if choices := choices_of(kind):
        several = any(typing.get_origin(part) is list for part in parts_of(kind))
        return f"any of {', '.join(choices)}" if several else " | ".join(choices)
    return "true | false" if bool in parts_of(kind) else str(range_of(kind) or "")
