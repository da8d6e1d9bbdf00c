"""The one exception family for mistakes a user can mend: one line that names the key, the value and the fix.

The command line turns a `UserError` into that line on stderr and exit status 2, a `Failure` into a line and 1, both
without a traceback; everything else is a defect and exits 1 with its traceback.
"""


class UserError(ValueError):
    """A mistake of the user's: the message is a single line and says how to mend it.

    Args:
        message: the line.
        on_every_rank: every rank of a machine finds the same, so one of them tells it; False where only this one can.
    """

    def __init__(self, message: str, *, on_every_rank: bool = True):
        self.on_every_rank = on_every_rank
        super().__init__(" ".join(str(message).split()))


class Failure(RuntimeError):
    """Not the user's mistake, but can be told in a line, with how to go on: a full disk, a killed worker.

    The command line exits 1 with that line.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class ConfigError(UserError):
    """A configuration value that cannot work: `key=value: why; fix`.

    Args:
        key: dotted key as the user would type it, `model.ffn_hidden_size`.
        value: the offending value.
        why: what is wrong with it.
        fix: what to do instead.
    """

    def __init__(self, key: str, value: object = None, why: str = "", fix: str = ""):
        self.key, self.value = key, value
        # Megatron's spec builder makes a new exception of the same class from a whole message.
        super().__init__(f"{key}={value!r}: {why}; {fix}" if why else key)
