"""Keys of earlier versions that another key has replaced.

A file or an option that gives such a key is an error that names the new key and the value to give. In the configuration
that a checkpoint records the key is translated, so that runs of earlier versions resume.
"""

from typing import Any

REPLACED: dict[str, tuple[str, dict[Any, Any]]] = {
    "log.tensorboard": ("log.trackers", {True: ["tensorboard"], False: []}),
}
"""By earlier key: the key of today, and its value for each earlier one."""


def successor(key: str, value: Any) -> tuple[str, Any]:
    """The key and value of today for those of an earlier version; both unchanged if the key was not replaced.

    Args:
        key: `section.name`.
        value: typed, or as text from a command line.

    Raises:
        KeyError: the key was replaced, and never had this value.
    """
    if key not in REPLACED:
        return key, value
    new, values = REPLACED[key]
    if isinstance(value, str):
        value = {str(old).lower(): old for old in values}[value.strip().lower()]
    return new, values[value]
