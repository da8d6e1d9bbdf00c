"""datatrove's quality filters by name, optionally with arguments: `GopherQualityFilter:min_doc_words=10`.

Any class of `datatrove.pipeline.filters` with arguments that can be written as text is supported; it decides on a
document as in datatrove's own pipeline.
"""

import inspect
import re
from difflib import get_close_matches

import yaml
from datatrove.data import Document

from elas.errors import UserError

_NOT_BY_NAME = {"LambdaFilter"}


def parse_filter(text: str) -> list:
    """Parse `NAME[:key=value,…]` to `[name, arguments]`; runs the filter once to find errors early.

    Raises:
        UserError: unknown filter or argument, a missing package, or a random filter without a seed.
    """
    name, _, given = text.partition(":")
    known = _classes()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise UserError(f"--filter {name}: unknown; " + (f"did you mean {near[0]}?" if near else ", ".join(known)))
    arguments = {}
    for pair in _pairs(given):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--filter {text}: {pair!r} is not an argument; write NAME:key=value,key=value")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--filter {text}: {value!r} is not YAML; put text in quotes, {key}='\"…\"'") from None
    takes = {k: p.default for k, p in inspect.signature(known[name]).parameters.items() if k != "exclusion_writer"}
    for key, value in arguments.items():
        if key not in takes:
            raise UserError(f"--filter {text}: {name} has no argument {key!r}; it has {', '.join(takes)}")
        _check_kind(f"--filter {name}:{key}={value}", value, takes[key])
    if "seed" in takes and arguments.get("seed") is None:
        raise UserError(f"--filter {text}: would keep different documents in every run; give {name}:seed=1")
    # A trial run: a missing package shows up only when a filter sees its first document.
    sample = Document("A few words, to see that all it needs is here.", "sample")
    try:
        rejection(make_filters([[name, arguments]]), sample)
    except UserError:
        raise
    except (OSError, TypeError, ValueError, re.error) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--filter {text}: fails on a sample document: {why}; correct its arguments") from error
    return [name, arguments]


def _check_kind(where: str, value: object, default: object) -> None:
    """Raise `UserError` for a value of another kind than the default; datatrove's annotations are not exact enough."""
    kinds = {bool: "true or false", int | float: "a number", str: "text"}
    for kind, what in kinds.items():
        if isinstance(default, kind):
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
                raise UserError(f"{where}: must be {what}; its default is {default}")
            return


def make_filters(filters: list[list]) -> list:
    """Create datatrove filters from `[name, arguments]` pairs; raises `UserError` if one cannot be created."""
    made = []
    for name, arguments in filters:
        try:
            made.append(_classes()[name](**arguments))
        except (ImportError, OSError, TypeError, ValueError, re.error) as error:
            raise UserError(f"--filter {name}: cannot be created: {' '.join(str(error).split())}") from error
    return made


def rejection(filters: list, document: Document) -> str | None:
    """The reason of the first filter that drops a document; None if all keep it. A filter may change its text."""
    for each in filters:
        try:
            result = each.filter_batch([document])[0]
        except (ImportError, LookupError) as error:
            why = f"{' '.join(str(error).split())[:300]}"
            raise UserError(f"--filter {type(each).__name__}: cannot run here: {why}") from error
        kept, reason = result if isinstance(result, tuple) else (result, None)
        if not kept:
            return f"{type(each).__name__}{f' ({reason})' if reason else ''}"
    return None


def _classes() -> dict[str, type]:
    from datatrove.pipeline import filters

    return {name: cls for name, cls in vars(filters).items() if inspect.isclass(cls) and name not in _NOT_BY_NAME}


def _pairs(given: str) -> list[str]:
    """Split at commas outside brackets."""
    pairs, depth, begin = [], 0, 0
    for position, character in enumerate(given):
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and depth == 0:
            pairs.append(given[begin:position])
            begin = position + 1
    return [pair for pair in [*pairs, given[begin:]] if pair.strip()]
