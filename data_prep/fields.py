"""Where the text is in a record: a key, or with dots a path into nested ones, `meta.text`."""

_NAMED = 10
_LONGEST = 200
_MISSING = object()


def find(record: dict, field: str) -> tuple[bool, object]:
    """Whether a record has the field, and its value; a key that has dots in its own name comes first."""
    if field in record:
        return True, record[field]
    value: object = record
    for key in field.split("."):
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING:
            return False, None
    return True, value


def names(record: dict) -> list[str]:
    """The fields of a record as `--field` takes them; nested ones with dots."""
    found = []
    for key, value in record.items():
        found += [f"{key}.{inner}" for inner in names(value)] if isinstance(value, dict) and value else [str(key)]
    return found


def missing(what: str, field: str, there: list[str]) -> str:
    """The reason for a record or table without the field, with those it has: `no column 'text' (it has id, body)`."""
    listed = ", ".join(name if name.isprintable() else repr(name) for name in there[:_NAMED])[:_LONGEST]
    more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
    return f"no {what} {field!r} (it has {listed or 'none'}{more})"


def is_missing(reason: str) -> bool:
    """Whether a reason is one of `missing`."""
    return reason.startswith(("no field ", "no column "))


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: it has no half of a surrogate pair, nor bytes that were passed on undecoded."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
