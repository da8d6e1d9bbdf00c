"""Types of settings: plain types, with the range of a number annotated on the field (`Annotated`).

`elas.config.catalogue` raises for a number without a range, so every numeric key has one.
"""

import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

LARGEST = 2**31 - 1
"""Megatron and NumPy store seeds and counts in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting allows; a bound of None is open.

    Attributes:
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        share_of: a float strictly between 0 and 1 is allowed as a share of this key.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    share_of: str | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        if not math.isfinite(value) or abs(value) > LARGEST:
            return False
        if self.share_of and isinstance(value, float):
            return 0 < value < 1
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"a value from {self.least:g} to {self.most:g}"
        parts = [f"more than {self.above:g}"] if self.above is not None else []
        parts += [f"{self.least:g} or more"] if self.least is not None else []
        parts += [f"and {self.most:g} at most"] if self.most is not None else []
        parts += [f"and below {self.below:g}"] if self.below is not None else []
        parts += [f"or a share of {self.share_of} between 0 and 1"] if self.share_of else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Says:
    """The allowed values of a text setting in words; checked by the code that uses the text."""

    text: str

    def __str__(self) -> str:
        return self.text


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
StepsOrShare = Annotated[int | float, Range(least=0, share_of="train.steps")]
StepsOrShareNotZero = Annotated[int | float, Range(least=1, share_of="train.steps")]
AboveZero = Annotated[float, Range(above=0)]
ZeroOrMore = Annotated[float, Range(least=0)]
BelowOne = Annotated[float, Range(least=0, below=1)]
UpToTwenty = Annotated[int, Range(least=1, most=20)]
Fraction = Annotated[float, Range(least=0, most=1)]
Rate = Annotated[float, Range(least=1e-12, most=1000)]
Folder = Annotated[str, Says("a folder's path")]
File = Annotated[str, Says("a file's path")]


def parts_of(kind: Any) -> list[Any]:
    """The plain types in a field's type, with `Annotated` and unions taken apart; a `Literal` is one part."""
    if typing.get_origin(kind) is Annotated:
        return parts_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [part for one in typing.get_args(kind) for part in parts_of(one)]
    return [kind]


def choices_of(kind: Any) -> list[str]:
    """The choices of a field whose type is a `Literal`, or a list of them; empty for other types."""
    found = []
    for part in parts_of(kind):
        inside = typing.get_args(part)[0] if typing.get_origin(part) is list else part
        found += [str(one) for one in typing.get_args(inside)] if typing.get_origin(inside) is Literal else []
    return found


def plain(kind: Any) -> Any:
    """A field's type without annotations."""
    return typing.Union[tuple(parts_of(kind))]  # noqa: UP007  the parts are known only here


def range_of(kind: Any) -> Range | Says | None:
    """The annotation on a field's type, or on a part of a union; None without one."""
    if typing.get_origin(kind) is Annotated:
        return next((one for one in typing.get_args(kind)[1:] if isinstance(one, Range | Says)), None)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next((found for one in typing.get_args(kind) if (found := range_of(one))), None)
    return None


def name_of(kind: Any) -> str:
    """A field's type in words: `a whole number or null`."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}

    def name(part: Any) -> str:
        if typing.get_origin(part) is Literal:
            return f"one of {', '.join(map(repr, typing.get_args(part)))}"
        if typing.get_origin(part) is list:
            return f"a list of any of {', '.join(map(repr, choices))}" if (choices := choices_of(part)) else "a list"
        return names[part]

    return " or ".join(name(part) for part in parts_of(kind))
