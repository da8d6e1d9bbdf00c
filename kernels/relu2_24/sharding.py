"""Which shards of DTensors fit together in the core: tokens, or features (tensor parallelism), of all operands alike.

    tokens      u, v, du, dv, kept: rows                                    dm_up, dn_down: partial sums
    features    m_up, dm_up: rows; n_down, dn_down, kept: columns           v, du: partial sums

Anything else is gathered by DTensor first. Features are cut so that every rank has whole groups of four.
"""

import functools
import sys

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24.compiled import KEEP, kept_of, needed, options_of


def is_sharded(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor; then the core's operators know about shards from here on."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second, and no DTensor exists before
    if module is None or not any(isinstance(x, module.DTensor) for x in tensors):
        return False
    register()
    return True


@functools.cache
def register() -> None:
    """Say to DTensor how the core's operators may be sharded. (Who compiles a model of DTensors calls it before.)"""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, rows, columns, partial = Replicate(), Shard(0), Shard(1), Partial()

    @register_sharding(torch.ops.elas.relu2_24_core.default)
    def _forward(u, m_up, n_down, keep, *how):
        options = options_of(how)
        number = kept_of(keep, options)
        _check_groups(m_up, options.sparse, packed=number == 2 and options.method == "magnitude")

        def kept(placement):
            return [placement] * number + [whole] * (2 - number)

        rest = [None] * (1 + len(how))
        return [
            ([whole, *kept(whole)], [whole, whole, whole, *rest]),
            ([rows, *kept(rows)], [rows, whole, whole, *rest]),
            ([partial, *kept(columns)], [whole, rows, columns, *rest]),
        ]

    @register_sharding(torch.ops.elas.relu2_24_core_backward.default)
    def _backward(u, m_up, n_down, kept0, kept1, dv, needs, *how):
        number = kept_of(KEEP, options_of(how))

        def kept(placement):
            return [placement] * number + [whole] * (2 - number)

        def grads(*placements):
            return [one if need else whole for one, need in zip(placements, needed(needs), strict=True)]

        rest = [None] * (1 + len(how))
        return [
            ([whole] * 3, [whole, whole, whole, *kept(whole), whole, *rest]),
            (grads(rows, partial, partial), [rows, whole, whole, *kept(rows), rows, *rest]),
            (grads(partial, rows, columns), [whole, rows, columns, *kept(columns), whole, *rest]),
        ]


def _check_groups(m_up, sparse: bool, packed: bool) -> None:
    """Refuse shards of features that cut a group of four (or a byte, which holds the positions of two groups).

    Raises:
        ConfigError: they do.
    """
    ranks = 1
    for size, placement in zip(m_up.mesh.shape, m_up.placements, strict=True):
        ranks *= size if placement.is_shard(0) else 1
    unit = 8 if packed else 4
    features = m_up.shape[0]
    if sparse and ranks > 1 and features % (unit * ranks):
        why = f"2:4 groups would straddle the {ranks} shards"
        if packed and features % (4 * ranks) == 0:
            why = f"compressed memory packs two 2:4 groups in a byte, which would straddle the {ranks} shards"
        raise ConfigError("features", features, why, f"give a multiple of {unit * ranks}")
