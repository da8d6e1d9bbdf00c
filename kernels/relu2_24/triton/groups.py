"""Groups of four in the registers of a Triton program: ranking, pruning and gradient of a tile.

Shapes: `m` tokens and `b` features of a tile; a *lane* holds one of the four features of every group; ρ = relu(z).

In the accumulator of a tensor-core product a thread holds columns 2t and 2t+1 of every eight, so four adjacent columns
are split over two threads. Weights are therefore loaded with their rows in the order of `feature_of`: lanes 0 and 1 of
a group are adjacent in the tile, lanes 2 and 3 are GAP columns further. If GAP matches the tile's layout
(triton/tiles.py), a group is in one thread: `lanes` and `unlanes` move nothing between threads. Gathering rows does not
slow the load. Tiles loaded from `[n, f]` in memory keep its order (`neighbours`), for 128-bit accesses.
"""

import triton
import triton.language as tl

DENSE = tl.constexpr(0)
MAGNITUDE = tl.constexpr(1)
SOFT_THRESHOLD = tl.constexpr(2)


@triton.jit
def feature_of(B: tl.constexpr, GAP: tl.constexpr):
    """Index within the tile of the feature in each of its B columns, a multiple of 2 · GAP: int32 `[B]`."""
    c = tl.arange(0, B)
    return c // (2 * GAP) * (2 * GAP) + c % GAP // 2 * 4 + c // GAP % 2 * 2 + c % 2


@triton.jit
def lanes(x, GAP: tl.constexpr):
    """Four `[m, b / (2 · GAP), GAP / 2]` from a tile `[m, b]` in the order of `feature_of`."""
    M: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (M, B // (2 * GAP), 2, GAP // 2, 2)), (0, 1, 3, 4, 2))
    low, high = tl.split(x)
    a, b = tl.split(low)
    c, d = tl.split(high)
    return a, b, c, d


@triton.jit
def unlanes(a, b, c, d, GAP: tl.constexpr):
    """Inverse of `lanes`."""
    M: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1] * 2 * GAP
    x = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.permute(x, (0, 1, 4, 2, 3)), (M, B))


@triton.jit
def neighbours(x):
    """Four lanes `[m, b/4]` of a tile `[m, b]` in the order of memory."""
    M: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (M, B // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def relu(z):
    """ρ; keeps NaN of either sign, which `tl.maximum` would turn into 0."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def _ranked(x):
    return tl.where(x != x, float("inf"), x)


@triton.jit
def order(a, b, c, d):
    """Masks of the two kept lanes and of the third, in the order of pack.py: two tuples of four int1."""
    a, b, c, d = _ranked(a), _ranked(b), _ranked(c), _ranked(d)
    keep_a, third_a = _wins(a >= b, a >= c, a >= d)
    keep_b, third_b = _wins(b > a, b >= c, b >= d)
    keep_c, third_c = _wins(c > a, c > b, c >= d)
    keep_d, third_d = _wins(d > a, d > b, d > c)
    return (keep_a, keep_b, keep_c, keep_d), (third_a, third_b, third_c, third_d)


@triton.jit
def _wins(p, q, r):
    """Whether two or three of the comparisons are True; whether exactly one is."""
    most = (p & q) | (r & (p | q))
    return most, (p | q | r) ^ most


@triton.jit
def roots(a, b, c, d, METHOD: tl.constexpr):
    """The four lanes that are squared: ρ − t (magnitude: t = 0) at the kept two, else 0; and masks of the third."""
    keep, third = order(a, b, c, d)
    t = 0.0
    if METHOD == SOFT_THRESHOLD:
        t = tl.where(third[0], a, 0.0) + tl.where(third[1], b, 0.0)
        t += tl.where(third[2], c, 0.0) + tl.where(third[3], d, 0.0)
    kept = (
        tl.where(keep[0], a - t, 0.0),
        tl.where(keep[1], b - t, 0.0),
        tl.where(keep[2], c - t, 0.0),
        tl.where(keep[3], d - t, 0.0),
    )
    return kept, third


@triton.jit
def times_root(ds, root, scale):
    """`2·scale·root·ds`; 0 where the root is 0, even if ds is infinite."""
    return tl.where(root == 0, 0.0, scale * ds * (2 * root))


@triton.jit
def at_third(d, total, third, rho):
    """d, and −total where third and positive."""
    return tl.where(third & (rho != 0), -total, d)


@triton.jit
def pruned(rho, scale, METHOD: tl.constexpr, GAP: tl.constexpr):
    """s `[m, b]` of a tile ρ in the order of `feature_of`, fp32."""
    if METHOD == DENSE:
        return rho * rho
    a, b, c, d = lanes(rho, GAP)
    kept, _ = roots(a, b, c, d, METHOD)
    root = unlanes(kept[0], kept[1], kept[2], kept[3], GAP)
    return scale * root * root


@triton.jit
def pruned_with_gradient(rho, ds, scale, METHOD: tl.constexpr, STE: tl.constexpr, GAP: tl.constexpr):
    """s and dz `[m, b]` of two tiles in the order of `feature_of`, fp32."""
    if METHOD == DENSE:
        return rho * rho, times_root(ds, rho, 1.0)
    a, b, c, d = lanes(rho, GAP)
    kept, third = roots(a, b, c, d, METHOD)
    root = unlanes(kept[0], kept[1], kept[2], kept[3], GAP)
    s = scale * root * root
    if STE:
        return s, times_root(ds, rho, scale)
    if METHOD == MAGNITUDE:
        return s, times_root(ds, root, scale)
    w, x, y, z = lanes(ds, GAP)
    w, x = times_root(w, kept[0], scale), times_root(x, kept[1], scale)
    y, z = times_root(y, kept[2], scale), times_root(z, kept[3], scale)
    total = w + x + y + z
    w, x = at_third(w, total, third[0], a), at_third(x, total, third[1], b)
    y, z = at_third(y, total, third[2], c), at_third(z, total, third[3], d)
    return s, unlanes(w, x, y, z, GAP)
