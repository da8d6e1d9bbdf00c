"""Shardings that DTensor may use for the core: all operands split by tokens, or by features (tensor parallelism).

    tokens      u, v, du, dv, kept: rows                                    dm_up, dn_down: partial sums
    features    m_up, dm_up: rows; n_down, dn_down, kept: columns           v, du: partial sums

DTensor gathers any other sharding first. Every rank must have whole groups of four features.
"""

import functools
import sys

import torch
from torch import Tensor

from elas.errors import ConfigError
from elas.kernels.relu2_24.compiled import KEEP, kept_of, needed, options_of


def is_sharded(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor; if so, registers the shardings of the core's operators."""
    module = sys.modules.get("torch.distributed.tensor")  # importing takes a second; before it no DTensor exists
    if module is None or not any(isinstance(x, module.DTensor) for x in tensors):
        return False
    register()
    return True


@functools.cache
def register() -> None:
    """Register the shardings of the core's operators with DTensor; call it before compiling a model of DTensors."""
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
    """Refuse shards of features that split a group of four, or a byte, which holds the positions of two groups.

    Raises:
        ConfigError: f is not a multiple of the groups or bytes of all shards.
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
