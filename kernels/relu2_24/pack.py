"""Groups of four: choosing the two that are kept, and packing their values with their positions.

Shapes: `f` features, `g = f / 4` groups; a *lane* holds one of the four features of every group, `[..., g]`.

Order within a group: by value, descending; NaN of either sign ranks as +inf; ties go to the lower index. The order is
total, so the kept two, the third and the fourth are unique positions, the same in every implementation.

A position is 2 bits. The two kept ones of a group, ascending, are a nibble `p0 | p1 << 2`; two groups share a byte, the
even group in the low nibble. Rows (tokens) start on byte boundaries, so rows can be processed independently. With bf16
values that is (2·16 + 4) / (4·16) = 9/16 of the dense activation.

Six pairwise comparisons and majorities replace topk, whose sort per group takes 1.7–2× as long (CPU, [4096 × 5504]).
"""

import torch
from torch import Tensor


def split_last(x: Tensor, size: int) -> Tensor:
    """View of `x [..., n·size]` as `[..., n, size]`.

    Not `Tensor.unflatten`: it is implemented in Python, which torch.compile does not trace under a torch-function mode
    such as the one that replaces CUDA (`elas.accelerator`).
    """
    return x.view(*x.shape[:-1], x.shape[-1] // size, size)


def lanes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of the four features of every group: `x [..., f]` as four `[..., g]`, strided by 4."""
    a, b, c, d = split_last(x, 4).unbind(-1)
    return a, b, c, d


def join(parts: list[Tensor]) -> Tensor:
    """Interleave `n` tensors `[..., g]` into a new `[..., n·g]`; `join(lanes(x))` is x."""
    return torch.stack(parts, dim=-1).flatten(-2)


def _wins(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every lane, whether it ranks before each of the three others: four triples of bool `[..., g]`."""
    x = x.detach()  # an order has no derivative; autograd would save tensors for it
    a, b, c, d = lanes(torch.where(x.isnan(), torch.inf, x))
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    return [(ab, ac, ad), (~ab, bc, bd), (~ac, ~bc, cd), (~ad, ~bd, ~cd)]


def keep_mask(x: Tensor) -> Tensor:
    """True at the two largest of every four: bool `[..., f]` for `x [..., f]`, f % 4 == 0, any floating dtype.

    A kept feature ranks before at least two of the three others.
    """
    return join([(p & q) | (r & (p | q)) for p, q, r in _wins(x)])


def keep_and_third(x: Tensor) -> tuple[Tensor, Tensor]:
    """`keep_mask(x)`, and True at the third largest of every four: two bool `[..., f]`.

    The third ranks before exactly one of the three others.
    """
    wins = _wins(x)
    keep = join([(p & q) | (r & (p | q)) for p, q, r in wins])
    third = join([(p ^ q ^ r) & ~(p & q & r) for p, q, r in wins])
    return keep, third


def kept_positions(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Positions 0–3 of the two kept features, ascending: uint8 `[..., g]` each, from the bool `keep [..., f]`."""
    k0, k1, k2, k3 = (lane.to(torch.uint8) for lane in lanes(keep))
    return (1 - k0) * (2 - k1), 1 + (k2 | k3) + k3


def one_position(mask: Tensor) -> Tensor:
    """Position 0–3 of the one True of every group: uint8 `[..., g]` from the bool `mask [..., f]`."""
    _, m1, m2, m3 = (lane.to(torch.uint8) for lane in lanes(mask))
    return m1 + 2 * m2 + 3 * m3


def take(x: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """The two kept features of every group: a new `[..., f/2]` in x's dtype, from `x [..., f]` and positions."""
    x0, x1, x2, x3 = lanes(x)
    low = torch.where(p0 == 0, x0, torch.where(p0 == 1, x1, x2))
    high = torch.where(p1 == 3, x3, torch.where(p1 == 2, x2, x1))
    return join([low, high])


def put(kept: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """Inverse of `take` with zeros elsewhere: a new `[..., f]` in the dtype of `kept [..., f/2]`."""
    low, high = split_last(kept, 2).unbind(-1)
    zero = torch.zeros((), dtype=kept.dtype, device=kept.device)
    return join([torch.where(p0 == j, low, torch.where(p1 == j, high, zero)) for j in range(4)])


def encode(p0: Tensor, p1: Tensor) -> Tensor:
    """Nibbles of two positions, two groups a byte: uint8 `[..., ceil(g/2)]` from two `[..., g]`."""
    nibbles = p0 | (p1 << 2)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def decode(codes: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Inverse of `encode`: two uint8 `[..., groups]` from `codes [..., ceil(groups/2)]`."""
    nibbles = join([codes & 15, codes >> 4])[..., :groups]
    return nibbles & 3, nibbles >> 2


def encode_third(p0: Tensor, p1: Tensor, third: Tensor, positive: Tensor) -> Tensor:
    """One byte a group, `p0 | p1 << 2 | third << 4 | positive << 6`: uint8 `[..., g]`; positive is bool."""
    return p0 | (p1 << 2) | (third << 4) | (positive.to(torch.uint8) << 6)


def decode_third(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `encode_third`: uint8 `p0, p1, third` and bool `positive`, each `[..., g]`."""
    return codes & 3, (codes >> 2) & 3, (codes >> 4) & 3, (codes >> 6).bool()
