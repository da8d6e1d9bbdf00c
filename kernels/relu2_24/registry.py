"""Which implementation of `ffn_core` runs: by name, or the best there is for what the backward pass may keep.

An implementation is known by the `ffn_memory` it serves and its name, so one name may serve several. A new one calls
`register` when its module is imported; registrations.py imports those of this package.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24.options import FfnMemory, Relu24Options
from elas.kernels.relu2_24.passes import Passes, differentiable

logger = logging.getLogger("elas.kernels")

Core = Callable[[Tensor, Tensor, Tensor, Relu24Options], Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute `ffn_core`.

    Args:
        name: what the user types as `sparsity.implementation`.
        ffn_memory: the memory mode it serves.
        core: `core(u, m_up, n_down, options) -> v`, inputs already checked.
        available: `available(device, dtype)` is None where it runs, else the reason why it does not; called once a
            device and dtype, so it may look at the machine or build an extension.
        priority: among available ones `auto` takes the highest.
        supports: `supports(options)` is None, or the reason why it does not compute these options.
        passes: the forward and backward that `core` is made of; `fused` and `compressed` ones have them (`of_passes`),
            and torch.compile runs them as one operator.
    """

    name: str
    ffn_memory: FfnMemory
    core: Core
    available: Callable[[torch.device, torch.dtype], str | None]
    priority: int
    supports: Callable[[Relu24Options], str | None] = lambda options: None
    passes: Passes | None = None

    @classmethod
    def of_passes(cls, name: str, ffn_memory: FfnMemory, passes: Passes, available: Callable, priority: int, **more):
        """An implementation whose `core` is the autograd function around `passes`."""
        return cls(name, ffn_memory, differentiable(passes), available, priority, passes=passes, **more)


_registered: dict[tuple[str, str], Implementation] = {}
_obstacles: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_announced: set[tuple] = set()


def register(implementation: Implementation) -> None:
    """Make an implementation known; a second one of the same name and `ffn_memory` is a defect.

    Raises:
        RuntimeError: when that pair is taken.
    """
    key = (implementation.ffn_memory, implementation.name)
    if key in _registered:
        raise RuntimeError(f"relu2_24 implementation {key} is registered twice")
    _registered[key] = implementation


def unregister(name: str, ffn_memory: FfnMemory) -> None:
    """Forget an implementation and what was found out about it (tests, and replacing one by hand)."""
    del _registered[(ffn_memory, name)]
    for key in [key for key in _obstacles if key[:2] == (ffn_memory, name)]:
        del _obstacles[key]


def implementations(ffn_memory: FfnMemory) -> list[Implementation]:
    """Those that serve `ffn_memory`, best first, available or not."""
    serving = [one for one in _registered.values() if one.ffn_memory == ffn_memory]
    return sorted(serving, key=lambda one: -one.priority)


def obstacle(one: Implementation, options: Relu24Options, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run here, or None."""
    key = (one.ffn_memory, one.name, device, dtype)
    if key not in _obstacles:
        _obstacles[key] = one.available(device, dtype)
    return _obstacles[key] or one.supports(options)


def select(
    options: Relu24Options, device: torch.device, dtype: torch.dtype, implementation: str = "auto"
) -> Implementation:
    """The implementation to run, for `options.ffn_memory` on `device` in `dtype`; see `choose`."""
    return choose(options, device, dtype, implementation)[0]


def choose(
    options: Relu24Options, device: torch.device, dtype: torch.dtype, implementation: str = "auto"
) -> tuple[Implementation, str]:
    """The implementation to run, for `options.ffn_memory` on `device` in `dtype`, and why that one.

    Args:
        options: `ffn_memory` and whatever an implementation may not support.
        device: of the tensors.
        dtype: of the tensors.
        implementation: a name, or `auto` for the available one of highest priority; what auto chose and why is
            logged once (logger `elas.kernels`, level info).

    Raises:
        ConfigError: `sparsity.ffn_memory` when nothing serves it, `sparsity.implementation` when the named one is not
            known or cannot run, or when none can; with the reasons.
    """
    serving = implementations(options.ffn_memory)
    if not serving:
        raise ConfigError(
            "sparsity.ffn_memory", options.ffn_memory, "is not available in this version", "use compressed"
        )
    if implementation != "auto":
        return _named(serving, implementation, options, device, dtype), "as sparsity.implementation asks"
    passed_over = []
    for one in serving:
        reason = obstacle(one, options, device, dtype)
        if reason is None:
            why = "auto passed over " + "; ".join(passed_over) if passed_over else "auto: the best there is"
            _announce(one, why, device, dtype)
            return one, why
        passed_over.append(f"{one.name}: {reason}")
    raise ConfigError(
        "sparsity.implementation",
        implementation,
        f"nothing that serves ffn_memory={options.ffn_memory} runs on {device} in {dtype} ({'; '.join(passed_over)})",
        "use ffn_memory compressed or eager",
    )


def _named(
    serving: list[Implementation], name: str, options: Relu24Options, device: torch.device, dtype: torch.dtype
) -> Implementation:
    """The one called `name` among `serving`, or a ConfigError that says why not."""
    names = " | ".join(["auto", *(one.name for one in serving)])
    for one in serving:
        if one.name == name:
            reason = obstacle(one, options, device, dtype)
            if reason is None:
                return one
            raise ConfigError("sparsity.implementation", name, f"not available: {reason}", f"use {names}")
    why = f"does not serve ffn_memory={options.ffn_memory}"
    raise ConfigError("sparsity.implementation", name, why, f"use {names}")


def _announce(one: Implementation, why: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say once per memory mode, kind of device, dtype and choice what auto took."""
    key = (one.ffn_memory, one.name, device.type, dtype, why)
    if key in _announced:
        return
    _announced.add(key)
    kind = str(dtype).removeprefix("torch.")
    logger.info("relu2_24 ffn_memory=%s on %s in %s: %s (%s)", one.ffn_memory, device.type, kind, one.name, why)
