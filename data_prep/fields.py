"""Find the text in a record: by key, or by a dotted path into nested records such as `meta.text`."""

_MAX_NAMES = 10
_MAX_CHARS = 200
_MISSING = object()


def find(record: dict, field: str) -> tuple[bool, object]:
    """Whether a record has the field, and its value; a key that itself contains dots takes precedence."""
    if field in record:
        return True, record[field]
    value: object = record
    for key in field.split("."):
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING:
            return False, None
    return True, value


def names(record: dict) -> list[str]:
    """The fields of a record in the form `--field` accepts; nested ones with dots."""
    found = []
    for key, value in record.items():
        found += [f"{key}.{inner}" for inner in names(value)] if isinstance(value, dict) and value else [str(key)]
    return found


def missing(what: str, field: str, present: list[str]) -> str:
    """The skip reason for a record or table without the field: `no column 'text' (it has id, body)`."""
    listed = ", ".join(name if name.isprintable() else repr(name) for name in present[:_MAX_NAMES])[:_MAX_CHARS]
    more = f" and {len(present) - _MAX_NAMES} more" if len(present) > _MAX_NAMES else ""
    return f"no {what} {field!r} (it has {listed or 'none'}{more})"


def is_missing(reason: str) -> bool:
    """Whether a skip reason was made by `missing`."""
    return reason.startswith(("no field ", "no column "))


def encodable(text: str) -> bool:
    """Whether the text can be encoded as UTF-8: no lone surrogates, which also stand for undecodable bytes."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
