"""What the arguments of the layers may be: mistakes are one line that names the argument, the value and the fix."""

from collections.abc import Iterable

from elas.config import SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options


def check_size(name: str, value: object) -> int:
    """A number of features.

    Raises:
        ConfigError: it is not a whole number above 0.
    """
    return check_count(name, value, "give a number of features, such as 256")


def check_count(name: str, value: object, fix: str) -> int:
    """A number of whatever the fix says.

    Raises:
        ConfigError: it is not a whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(name, value, "is not a whole number above 0", fix)
    return value


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse what is not among the choices.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(name, value, "is not a choice", f"use {' | '.join(map(str, choices))}")


def sparsity_of(
    kind: object, options: Relu24Options | None, dense_steps: int, features: tuple[str, int], implementation: str
) -> SparsityConfig:
    """The section that `elas.model.activation.SparseSwitch` takes.

    Args:
        kind: the non-linearity; only `relu2` can be sparse.
        options: of the kernel; None: 2:4 where there is a squared ReLU.
        dense_steps: training steps before 2:4.
        features: name and size of what is cut into groups of four.
        implementation: of the core; see `elas.kernels.relu2_24.ffn_core`.

    Raises:
        ConfigError: options for another non-linearity, features that do not divide by 4, dense steps of nothing.
    """
    if options is not None and not isinstance(options, Relu24Options):
        raise ConfigError("options", options, "is not Relu24Options", "use elas.nn.Relu24Options(...)")
    if kind != "relu2" and options is not None and options.sparse:
        why = f"2:4 needs a squared ReLU, and the activation is {kind}"
        raise ConfigError("options", options, why, 'leave it out, or use activation="relu2"')
    options = options or Relu24Options(sparse=kind == "relu2")
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        why = "is not a whole number of training steps"
        raise ConfigError("dense_steps", dense_steps, why, "give 0 for none, or a number such as 1000")
    if dense_steps and not options.sparse:
        raise ConfigError("dense_steps", dense_steps, "there is no 2:4 to begin after them", "leave it out")
    name, size = features
    if options.sparse and size % 4:
        fix = f"give a multiple of 4, such as {(size // 4 + 1) * 4}"
        raise ConfigError(name, size, "2:4 groups of four need whole groups", fix)
    return SparsityConfig(
        kind="2:4" if options.sparse else "none",
        method=options.method,
        gradient=options.gradient,
        backward=options.backward,
        dense_steps=dense_steps,
        ffn_memory=options.ffn_memory,
        scale=options.scale,
        implementation=implementation,
    )
