"""The standard deviation of initial factors."""

import math


def factor_std(kind: str, rank: int, size: int, in_size: int, out_size: int) -> float:
    """Standard deviation of a factor's normal initialisation.

    Args:
        kind: `lowrank`: sqrt(2 / (size + r)), as LORO; `cola`: (in + out)^(-1/4) / r^(1/4), as CoLA.
        rank: r.
        size: the factor's long dimension.
        in_size: input width of the pair.
        out_size: output width of the pair.
    """
    if kind == "cola":
        return (in_size + out_size) ** -0.25 / rank**0.25
    return math.sqrt(2.0 / (size + rank))
