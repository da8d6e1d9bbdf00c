"""Chooses the implementation of `ffn_core`: by name, or the fastest one that serves the memory mode and runs here.

An implementation is identified by its `ffn_memory` and its name, so one name may serve several memory modes. To add
one, call `register` when its module is imported; registrations.py imports the modules of this package.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24.options import FfnMemory, Relu24Options
from elas.kernels.relu2_24.passes import Passes, differentiable

logger = logging.getLogger("elas.kernels")

Core = Callable[[Tensor, Tensor, Tensor, Relu24Options], Tensor]
PLAIN = 0
"""Priority of PyTorch's own operations: the slowest, and available everywhere."""
FASTEST = "auto: the fastest"


class Widths(NamedTuple):
    """The widths of a core on one rank.

    Attributes:
        r_in: of u, the columns of `m_up [f, r_in]`.
        features: f.
        r_out: of v, the rows of `n_down [r_out, f]`.
    """

    r_in: int
    features: int
    r_out: int

    @classmethod
    def of(cls, m_up: Tensor, n_down: Tensor) -> "Widths":
        """From `m_up [f, r_in]` and `n_down [r_out, f]`."""
        return cls(m_up.shape[1], m_up.shape[0], n_down.shape[0])


@dataclass(frozen=True)
class Implementation:
    """One way to compute `ffn_core`.

    Args:
        name: the value of the argument `implementation` that chooses it.
        ffn_memory: the memory mode it serves.
        core: `core(u, m_up, n_down, options) -> v`; its inputs are already checked.
        available: `available(device, dtype)` returns None where it runs, else the reason why not. It is called once for
            each device and dtype, so it may probe the machine or build an extension.
        priority: `auto` takes the available one of highest priority.
        supports: `supports(options)` returns None, or the reason why it does not compute these options.
        fits: `fits(widths, device, dtype)` returns None, or the reason why it does not compute these widths; called
            for every choice, so it must be quick.
        yields: `yields(widths, device, dtype)` returns None, or the reason why `auto` leaves these widths, which it
            computes, to the next one.
        passes: the forward and backward pass that `core` is made of (`of_passes`); `fused` and `compressed`
            implementations have them, and torch.compile runs them as one operator.
    """

    name: str
    ffn_memory: FfnMemory
    core: Core
    available: Callable[[torch.device, torch.dtype], str | None]
    priority: int
    supports: Callable[[Relu24Options], str | None] = lambda options: None
    fits: Callable[[Widths, torch.device, torch.dtype], str | None] = lambda widths, device, dtype: None
    yields: Callable[[Widths, torch.device, torch.dtype], str | None] = lambda widths, device, dtype: None
    passes: Passes | None = None

    @classmethod
    def of_passes(cls, name: str, ffn_memory: FfnMemory, passes: Passes, available: Callable, priority: int, **more):
        """An implementation whose `core` is the autograd function around `passes`."""
        return cls(name, ffn_memory, differentiable(passes), available, priority, passes=passes, **more)


_registered: dict[tuple[str, str], Implementation] = {}
_obstacles: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_announced: set[tuple] = set()


def register(implementation: Implementation) -> None:
    """Add an implementation.

    Raises:
        RuntimeError: another one has its name and `ffn_memory`.
    """
    key = (implementation.ffn_memory, implementation.name)
    if key in _registered:
        raise RuntimeError(f"relu2_24 implementation {key} is registered twice")
    _registered[key] = implementation


def unregister(name: str, ffn_memory: FfnMemory) -> Implementation:
    """Remove an implementation and forget where it is available; returns it."""
    for key in [key for key in _obstacles if key[:2] == (ffn_memory, name)]:
        del _obstacles[key]
    return _registered.pop((ffn_memory, name))


def implementations(ffn_memory: FfnMemory) -> list[Implementation]:
    """Those that serve `ffn_memory`, highest priority first, available or not."""
    serving = [one for one in _registered.values() if one.ffn_memory == ffn_memory]
    return sorted(serving, key=lambda one: -one.priority)


def obstacle(
    one: Implementation,
    options: Relu24Options,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None = None,
) -> str | None:
    """Why this implementation cannot run here, or None; without `widths` they are not checked."""
    key = (one.ffn_memory, one.name, device, dtype)
    if key not in _obstacles:
        _obstacles[key] = one.available(device, dtype)
    found = _obstacles[key] or one.supports(options)
    return found if found or widths is None else one.fits(widths, device, dtype)


def select(
    options: Relu24Options,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str = "auto",
    widths: Widths | None = None,
) -> Implementation:
    """The implementation to run, as `choose`; logs once what `auto` chose and why (logger `elas.kernels`).

    The level is warning, which Python shows by default, where `auto` passed over a kernel for PyTorch's own operations;
    else info.
    """
    one, why = choose(options, device, dtype, implementation, widths)
    if implementation == "auto":
        _announce(one, why, device, dtype)
    return one


def choose(
    options: Relu24Options,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str = "auto",
    widths: Widths | None = None,
) -> tuple[Implementation, str]:
    """The implementation for `options.ffn_memory` on `device` in `dtype`, and why that one.

    Args:
        options: `ffn_memory`, and what an implementation may not support.
        device: of the tensors.
        dtype: of the tensors.
        implementation: a name, or `auto` for the available one of highest priority.
        widths: of the core; None if they are not known.

    Raises:
        ConfigError: `ffn_memory` if nothing serves it; `implementation` if the named one is unknown or cannot run, or
            if none can, with the reasons.
    """
    serving = implementations(options.ffn_memory)
    if not serving:
        raise ConfigError("ffn_memory", options.ffn_memory, "is not available", "use ffn_memory=compressed")
    if implementation != "auto":
        return _named(serving, implementation, options, device, dtype, widths), "chosen by name"
    passed_over = []
    for one in serving:
        reason = obstacle(one, options, device, dtype, widths)
        if reason is None and widths is not None:
            reason = one.yields(widths, device, dtype)
        if reason is None:
            return one, "auto passed over " + "; ".join(passed_over) if passed_over else FASTEST
        passed_over.append(f"{one.name}: {reason}")
    raise ConfigError(
        "implementation",
        implementation,
        f"nothing that serves ffn_memory={options.ffn_memory} runs on {device} in {dtype} ({'; '.join(passed_over)})",
        "use ffn_memory=compressed or ffn_memory=eager",
    )


def _named(
    serving: list[Implementation],
    name: str,
    options: Relu24Options,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None,
) -> Implementation:
    """The one called `name` among `serving`, or a ConfigError that says why not."""
    names = " | ".join(["auto", *(one.name for one in serving)])
    for one in serving:
        if one.name == name:
            reason = obstacle(one, options, device, dtype, widths)
            if reason is None:
                return one
            raise ConfigError("implementation", name, f"not available: {reason}", f"use {names}")
    why = f"does not serve ffn_memory={options.ffn_memory}"
    raise ConfigError("implementation", name, why, f"use {names}")


def announced(one: Implementation, why: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this choice of `auto` was shown before, by `select` or by whoever called this; from now on it was."""
    key = (one.ffn_memory, one.name, device.type, dtype, why)
    before = key in _announced
    _announced.add(key)
    return before


def _announce(one: Implementation, why: str, device: torch.device, dtype: torch.dtype) -> None:
    if announced(one, why, device, dtype):
        return
    slow = one.priority == PLAIN and why != FASTEST
    logger.log(
        logging.WARNING if slow else logging.INFO,
        "relu2_24 ffn_memory=%s on %s in %s: %s (%s)",
        one.ffn_memory,
        device.type,
        str(dtype).removeprefix("torch."),
        one.name,
        why,
    )
