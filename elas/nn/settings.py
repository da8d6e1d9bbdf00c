"""Checks of the layers' arguments; an error is one line with the argument, its value and the fix."""

from collections.abc import Iterable

import torch

from elas.config import SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, registry
from elas.kernels.relu2_24.options import DTYPES


def check_size(name: str, value: object) -> int:
    """Return a number of features.

    Raises:
        ConfigError: it is not a whole number above 0.
    """
    return check_count(name, value, "give a number of features, such as 256")


def check_count(name: str, value: object, fix: str) -> int:
    """Return a count; the fix says of what.

    Raises:
        ConfigError: it is not a whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(name, value, "is not a whole number above 0", fix)
    return value


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Check a value against its choices.

    Raises:
        ConfigError: it is not among them.
    """
    if value not in choices:
        raise ConfigError(name, value, "is not a choice", f"use {' | '.join(map(str, choices))}")


def check_parameters(bias: object, dtype: object, kind: object) -> None:
    """Check the arguments about parameters.

    Args:
        bias: whether there are biases.
        dtype: of the parameters; None: torch's default.
        kind: the non-linearity; a squared ReLU supports fewer dtypes.

    Raises:
        ConfigError: a value of another type, or fp16 with a squared ReLU.
    """
    if not isinstance(bias, bool):
        raise ConfigError("bias", bias, "is not a boolean", "give True or False")
    found = torch.get_default_dtype() if dtype is None else dtype
    if kind == "relu2" and found == torch.float16:
        raise ConfigError("dtype", found, "relu² overflows above 256", "use torch.bfloat16 or torch.float32")
    if found not in (*DTYPES, torch.float16):
        fix = "use torch.float64, torch.float32 or torch.bfloat16"
        raise ConfigError("dtype", found, "is not supported by these layers", fix)


def check_implementation(name: object, kind: object, options: Relu24Options) -> None:
    """Refuse a kernel that does not compute these options on any device.

    Raises:
        ConfigError: an unknown kernel, one for other options, or an activation without a kernel.
    """
    if name == "auto":
        return
    if kind != "relu2":
        why = f"the activation is {kind}, which has no kernel"
        raise ConfigError("implementation", name, why, "leave it out")
    serving = registry.implementations(options.ffn_memory)
    names = " | ".join(["auto", *(one.name for one in serving if one.supports(options) is None)])
    found = next((one for one in serving if one.name == name), None)
    why = f"does not serve ffn_memory={options.ffn_memory}" if found is None else found.supports(options)
    if why is not None:
        raise ConfigError("implementation", name, why, f"use {names}")


def sparsity_of(
    kind: object, options: Relu24Options | None, dense_steps: int, features: tuple[str, int], implementation: str
) -> SparsityConfig:
    """The `sparsity` section for `elas.model.activation.SparseSwitch`.

    Args:
        kind: the non-linearity; only `relu2` can be sparse.
        options: of the kernel; None: 2:4 if the non-linearity is a squared ReLU.
        dense_steps: training steps before 2:4.
        features: name and size of the dimension that is pruned in groups of four.
        implementation: of the core; see `elas.kernels.relu2_24.ffn_core`.

    Raises:
        ConfigError: options for another non-linearity, features that are not a multiple of 4, dense steps without 2:4,
            or an implementation that does not compute the options.
    """
    if options is not None and not isinstance(options, Relu24Options):
        raise ConfigError("options", options, "is not Relu24Options", "use elas.nn.Relu24Options(...)")
    if kind != "relu2" and options is not None and options.sparse:
        why = f"2:4 requires a squared ReLU, and the activation is {kind}"
        raise ConfigError("options", options, why, 'leave it out, or use activation="relu2"')
    options = options or Relu24Options(sparse=kind == "relu2")
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        why = "is not a whole number of training steps"
        raise ConfigError("dense_steps", dense_steps, why, "give 0 for none, or a number such as 1000")
    if dense_steps and not options.sparse:
        raise ConfigError("dense_steps", dense_steps, "there is no 2:4 after them", "leave it out")
    check_implementation(implementation, kind, options)
    name, size = features
    if options.sparse and size % 4:
        fix = f"give a multiple of 4, such as {(size // 4 + 1) * 4}"
        raise ConfigError(name, size, "does not split into groups of 4", fix)
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
