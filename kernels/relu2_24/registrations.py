"""Registers the implementations of this package; those of other packages register themselves on import."""

from collections.abc import Callable

import torch

from elas.kernels.relu2_24 import cpu, reference, registry, semi_structured  # noqa: F401
from elas.kernels.relu2_24.options import Relu24Options
from elas.kernels.relu2_24.plain.compressed import TorchCompressed
from elas.kernels.relu2_24.plain.fused import TorchFused
from elas.kernels.relu2_24.plain.split import SplitBackward
from elas.kernels.relu2_24.triton import chunked, compressed, fused  # noqa: F401


def _everywhere(device: torch.device, dtype: torch.dtype) -> None:
    """Plain PyTorch runs on every device and in every dtype that `check_activation` allows."""


def _backward_is(kind: str) -> Callable[[Relu24Options], str | None]:
    return lambda options: None if options.backward == kind else f"computes the {kind} backward pass only"


registry.register(
    registry.Implementation(
        "reference", "eager", reference.ffn_core, _everywhere, priority=registry.PLAIN, supports=_backward_is("dense")
    )
)
registry.register(
    registry.Implementation.of_passes(
        "split", "eager", SplitBackward(), _everywhere, priority=registry.PLAIN, supports=_backward_is("split")
    )
)
registry.register(
    registry.Implementation.of_passes("torch", "fused", TorchFused(), _everywhere, priority=registry.PLAIN)
)
registry.register(
    registry.Implementation.of_passes("torch", "compressed", TorchCompressed(), _everywhere, priority=registry.PLAIN)
)
