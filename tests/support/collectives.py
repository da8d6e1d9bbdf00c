"""Counting of what collectives send."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "AR",
    "_allgather_base_": "AG",
    "allgather_": "AG",
    "_reduce_scatter_base_": "RS",
    "reduce_scatter_": "RS",
}


class CountCollectives(TorchDispatchMode):
    """Adds up, by kind, the bytes of the whole tensor of every collective below it."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            kind = KINDS.get(name, name)
            tensors = args[1] if kind == "RS" else args[0]  # all-gather and reduce-scatter take (output, input)
            self.sizes[kind] = self.sizes.get(kind, 0) + sum(t.nbytes for t in _flat(tensors))
        return func(*args, **(kwargs or {}))


class CountSent(TorchDispatchMode):
    """Adds up the bytes that this rank gives to other ranks in all-to-alls."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "c10d::alltoall_base_":
            _, given, group, _, splits = args[:5]
            own = splits[torch.distributed.ProcessGroup.unbox(group).rank()] * given.element_size()
            self.bytes += given.nbytes - own
        return func(*args, **(kwargs or {}))


def _flat(tensors) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [t for inner in tensors for t in _flat(inner)]
