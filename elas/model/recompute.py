"""Computing wide tensors again in the backward pass, from narrow ones that are kept anyway.

Autograd keeps a layer's norm outputs, its queries, keys and values and, in a gated FFN, gate, up and their product. All
follow at little cost from what is kept besides: the residual stream, and bottlenecks of r values a token. `Again` makes
autograd keep a note in place of such a tensor:

    again = Again(lambda: linear(u, expand=True))     # as q, k, v were computed from u
    again.drop(q, k, v)
    with again.hooks():
        out = attention(q, k, v)                      # keeps its output and the note

When the backward pass of `attention` needs q, the note computes all three, the same operations on the same values and
so the same bits, and frees each after its last use. Gradients flow through the original graph, so weights get theirs as
without. What is computed again goes through the modules' own calls, whose hooks gather weights that ZeRO 3 has
partitioned; nothing that was communicated between ranks is communicated again.

Megatron-core's `recompute_granularity` recomputes whole modules, attention and collectives included.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_Note = tuple[int, torch.Size, tuple[int, ...], int | torch.SymInt]
"""Index of the tensor, and the view of it that was saved."""


class Again:
    """Replaces tensors that autograd would save by a way to compute them again.

    Args:
        compute: returns all tensors given to `drop`, in that order, each in storage of its own as it was then; called
            without gradients. It must not hold the tensors themselves.
    """

    def __init__(self, compute: Callable[[], Sequence[torch.Tensor]]):
        self._compute = compute
        self._places: dict[int, int] = {}  # index by storage; a tensor that shares storage is saved through this one
        self._uses: list[int] = []
        self._left: list[int] = []
        self._found: list[torch.Tensor | None] = []

    def drop(self, *tensors: torch.Tensor) -> None:
        """Name the next tensors that `compute` returns; before they are used within `hooks`."""
        for tensor in tensors:
            self._places[tensor.untyped_storage()._cdata] = len(self._uses)
            self._uses.append(0)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which autograd saves a note instead of the named tensors, and others as they are."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Note:
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is None:
            return tensor
        self._uses[place] += 1
        return place, tensor.shape, tensor.stride(), tensor.storage_offset()

    @torch.no_grad()
    def _unpack(self, saved: torch.Tensor | _Note) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        place, size, stride, offset = saved
        if not self._left or not self._left[place]:
            self._found, self._left = list(self._compute()), list(self._uses)
            # A tensor that nothing saved needs no copy.
            self._found = [one if uses else None for one, uses in zip(self._found, self._uses, strict=True)]
        found = self._found[place]
        assert found is not None
        self._left[place] -= 1
        if not self._left[place]:
            self._found[place] = None
        return found.as_strided(size, stride, offset)


class Remembers:
    """Mixin of modules whose caller may ask for the tensor from which the last output can be computed again.

    It is asked for right after the call, so that several micro-batches can be under way.
    """

    remembers = False
    """Whether to; set by the layer that asks."""
    _remembered: torch.Tensor | None = None

    def remember(self, tensor: torch.Tensor) -> None:
        """Note `tensor`, if a backward pass can follow."""
        if self.remembers and torch.is_grad_enabled():
            self._remembered = tensor.detach()

    def recall(self) -> torch.Tensor | None:
        """The tensor noted in the last call, once; None if there is none."""
        found, self._remembered = self._remembered, None
        return found


def norm_again(norm: Any, normalised: torch.Tensor) -> Again | None:
    """How the norm's last output is computed again; None if it does not remember its input.

    Args:
        norm: a module with `Remembers`, or None.
        normalised: its output, or another tensor in the same storage.
    """
    if norm is None or (x := norm.recall()) is None:
        return None
    again = Again(lambda: (norm(x),))
    again.drop(normalised)
    return again
