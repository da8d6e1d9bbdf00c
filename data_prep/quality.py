"""datatrove's quality filters, by name, with arguments or without: `GopherQualityFilter:min_doc_words=10`.

Any class of `datatrove.pipeline.filters` whose arguments can be written down will do; it decides on a document as it
would in datatrove's own pipeline.
"""

import inspect
from difflib import get_close_matches

import yaml
from datatrove.data import Document

from elas.errors import UserError

_NOT_BY_NAME = {"LambdaFilter"}


def parse_filter(text: str) -> list:
    """`NAME[:key=value,…]` to `[name, arguments]`; the filter is tried once, to find mistakes.

    Raises:
        UserError: no such filter or argument, a package that it needs is missing, or its choice is random.
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
            raise UserError(f"--filter {text}: {pair!r} is no argument; write NAME:key=value,key=value")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--filter {text}: {value!r} is no value; put text in quotes, {key}='\"…\"'") from None
    takes = [key for key in inspect.signature(known[name]).parameters if key != "exclusion_writer"]
    for key in arguments:
        if key not in takes:
            raise UserError(f"--filter {text}: {name} has no argument {key!r}; it has {', '.join(takes)}")
    if "seed" in takes and arguments.get("seed") is None:
        raise UserError(f"--filter {text}: would keep others every time; give {name}:seed=1")
    rejection(make_filters([[name, arguments]]), Document("A few words, to see that all it needs is here.", "sample"))
    return [name, arguments]


def make_filters(filters: list[list]) -> list:
    """The filters of `[name, arguments]`."""
    made = []
    for name, arguments in filters:
        try:
            made.append(_classes()[name](**arguments))
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise UserError(f"--filter {name}: cannot be made: {' '.join(str(error).split())}") from error
    return made


def rejection(filters: list, document: Document) -> str | None:
    """Why the first filter that does leaves a document out; None when all keep it. A filter may change its text."""
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
