"""The exceptions for errors that are reported to the user in one line.

The command line turns a `UserError` into that line on stderr and exit status 2, a `Failure` into a line and status 1,
both without a traceback; everything else is a bug and exits with 1 and its traceback.
"""

import re
from collections.abc import Mapping


class UserError(ValueError):
    """An error that the user can fix; the message is a single line that says how.

    Args:
        message: the line.
        on_every_rank: whether every rank of a machine finds the same error, so that only one of them prints it.
    """

    def __init__(self, message: str, *, on_every_rank: bool = True):
        self.on_every_rank = on_every_rank
        super().__init__(" ".join(str(message).split()))


class Failure(RuntimeError):
    """An error at run time, not in the user's input, with a single-line message: a full disk, a killed worker."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class ConfigError(UserError):
    """An invalid configuration value: `key=value: why; fix`.

    `why` and `fix` write the names of other settings as `name=value`, so that `renamed` finds them.

    Args:
        key: dotted key as the user would type it, `model.ffn_hidden_size`.
        value: the invalid value.
        why: what is wrong with it.
        fix: what to do instead.
    """

    def __init__(self, key: str, value: object = None, why: str = "", fix: str = ""):
        self.key, self.value = key, value
        # Megatron's spec builder makes a new exception of the same class from a whole message.
        super().__init__(f"{key}={value!r}: {why}; {fix}" if why else key)

    def renamed(self, names: Mapping[str, str]) -> "ConfigError":
        """The same error for a caller with other names: the key, and every `name=value` in the message.

        Args:
            names: the caller's name by the one used here, such as `{"implementation": "sparsity.implementation"}`.
        """
        found = ConfigError(re.sub(r"(?<![\w.-])(\w+)(?==)", lambda one: names.get(one[1], one[1]), str(self)))
        found.key, found.value = names.get(self.key, self.key), self.value
        return found
