"""Triton kernels of compressed memory: squared ReLU, 2:4 pruning and packing in one pass over memory, and back.

Shapes: `f` features, `g = f / 4` groups, `n` tokens; ρ = relu(z).

    prune_and_pack_kernel   z → s, and values and codes in pack.py's layout, or ρ, or nothing more
    restore_kernel          values, codes → s, and dz from ds; either may be omitted
    slope_kernel            ρ, ds → dz without pruning
    step_kernel             z, ds → s, dz, in their place (chunked.py)

Tiles keep the order of memory, so values are read and written in 128-bit words. A byte of codes holds two groups (one
for the soft threshold).

Values are rounded to the dtype of z where plain/compressed.py rounds them, so results equal PyTorch's to the last bit,
except that the compiler may fuse a product and a sum of the fp32 soft threshold.
"""

import triton
import triton.language as tl

from elas.kernels.relu2_24.triton.groups import DENSE, SOFT_THRESHOLD, neighbours, order, relu

NOTHING = tl.constexpr(0)
RHO = tl.constexpr(1)
PACKED = tl.constexpr(2)


@triton.jit
def _as(x, pointer):
    """Rounded to the dtype of the pointer, as fp32."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _together(a, b, c, d):
    """Inverse of `neighbours`: four `[m, b/4]` to `[m, b]`."""
    x = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(x, (a.shape[0], a.shape[1] * 4))


@triton.jit
def _at(position, a, b, c, d):
    return tl.where(position == 0, a, tl.where(position == 1, b, tl.where(position == 2, c, d)))


@triton.jit
def _sum_at(mask, a, b, c, d):
    """The lane where mask is set; the other three add 0."""
    low = tl.where(mask[0], a, 0.0) + tl.where(mask[1], b, 0.0)
    return low + (tl.where(mask[2], c, 0.0) + tl.where(mask[3], d, 0.0))


@triton.jit
def _square(excess, scale, pointer, METHOD: tl.constexpr):
    """s, rounded after each multiplication."""
    s = _as(excess * excess, pointer)
    if METHOD == SOFT_THRESHOLD:
        s = _as(scale * s, pointer)
    return s


@triton.jit
def _where(n, f, BM: tl.constexpr, B: tl.constexpr, columns):
    """Offsets `[BM, B]` in a matrix of `columns`, and whether each is inside n rows and f columns."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    at = tl.program_id(1) * B + tl.arange(0, B)
    return rows[:, None] * columns + at[None, :], (rows < n)[:, None] & (at < f)[None, :]


@triton.jit
def _put_codes(codes, nibbles, n, groups, code_columns, METHOD: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """Store a byte for each group, or for two groups; the missing second group of a row's last byte is 0."""
    if METHOD == SOFT_THRESHOLD:
        offsets, inside = _where(n, groups, BM, BF // 4, code_columns)
        tl.store(codes + offsets, nibbles.to(tl.uint8), mask=inside)
    else:
        group = tl.program_id(1) * (BF // 4) + tl.arange(0, BF // 4)
        nibbles = tl.where((group < groups)[None, :], nibbles, 0)
        low, high = tl.split(tl.reshape(nibbles, (BM, BF // 8, 2)))
        offsets, inside = _where(n, code_columns, BM, BF // 8, code_columns)
        tl.store(codes + offsets, (low | (high << 4)).to(tl.uint8), mask=inside)


@triton.jit
def prune_and_pack_kernel(
    z, s, values, codes, n, f, code_columns, scale,
    METHOD: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n, tiles of f): `z [n, f]` → `s [n, f]`; KEEP adds ρ `[n, f]` (in values), or values and codes."""
    offsets, inside = _where(n, f, BM, BF, f)
    rho = relu(tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32))
    if KEEP == RHO:
        tl.store(values + offsets, rho.to(z.dtype.element_ty), mask=inside)
    if METHOD == DENSE:
        tl.store(s + offsets, (rho * rho).to(s.dtype.element_ty), mask=inside)
    else:
        a, b, c, d = neighbours(rho)
        keep, third = order(a, b, c, d)
        t = 0.0
        if METHOD == SOFT_THRESHOLD:
            t = _sum_at(third, a, b, c, d)
        sa = _square(tl.where(keep[0], _as(a - t, z), 0.0), scale, z, METHOD)
        sb = _square(tl.where(keep[1], _as(b - t, z), 0.0), scale, z, METHOD)
        sc = _square(tl.where(keep[2], _as(c - t, z), 0.0), scale, z, METHOD)
        sd = _square(tl.where(keep[3], _as(d - t, z), 0.0), scale, z, METHOD)
        tl.store(s + offsets, _together(sa, sb, sc, sd).to(s.dtype.element_ty), mask=inside)
        if KEEP == PACKED:
            first = tl.where(keep[0], 0, tl.where(keep[1], 1, 2))
            second = tl.where(keep[3], 3, tl.where(keep[2], 2, 1))
            pair = tl.join(_at(first, sa, sb, sc, sd), _at(second, sa, sb, sc, sd))
            offsets, inside = _where(n, f // 2, BM, BF // 2, f // 2)
            kept = tl.reshape(pair, (BM, BF // 2)).to(values.dtype.element_ty)
            tl.store(values + offsets, kept, mask=inside)
            code = first | (second << 2)
            if METHOD == SOFT_THRESHOLD:
                place = tl.where(third[0], 0, tl.where(third[1], 1, tl.where(third[2], 2, 3)))
                code = code | (place << 4) | tl.where(_at(place, a, b, c, d) != 0, 64, 0)
            _put_codes(codes, code, n, f // 4, code_columns, METHOD, BM, BF)


@triton.jit
def _slope(ds, s, scale, pointer, METHOD: tl.constexpr):
    """`2·root·ds` of a kept value s, with each factor rounded first; 0 where s is 0."""
    if METHOD == SOFT_THRESHOLD:
        s = tl.div_rn(s, scale)
        ds = _as(scale * ds, pointer)
    root = _as(tl.sqrt_rn(s), pointer)
    return tl.where(root == 0, 0.0, _as(ds * (2 * root), pointer))


@triton.jit
def _spread(first, second, low, high, POSITION: tl.constexpr):
    return tl.where(first == POSITION, low, tl.where(second == POSITION, high, 0.0))


@triton.jit
def _codes(codes, n, groups, code_columns, METHOD: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """Load the code of every group: int32 `[BM, BF/4]`."""
    if METHOD == SOFT_THRESHOLD:
        offsets, inside = _where(n, groups, BM, BF // 4, code_columns)
        code = tl.load(codes + offsets, mask=inside, other=0).to(tl.int32)
    else:
        offsets, inside = _where(n, code_columns, BM, BF // 8, code_columns)
        byte = tl.load(codes + offsets, mask=inside, other=0).to(tl.int32)
        code = tl.reshape(tl.join(byte & 15, byte >> 4), (BM, BF // 4))
    return code


@triton.jit
def restore_kernel(
    values, codes, ds, s, dz, n, f, code_columns, scale,
    METHOD: tl.constexpr, NEEDS_S: tl.constexpr, NEEDS_DZ: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n, tiles of f): `values [n, f/2]`, codes, `ds [n, f]` → `s`, `dz [n, f]`."""
    code = _codes(codes, n, f // 4, code_columns, METHOD, BM, BF)
    first, second = code & 3, (code >> 2) & 3
    offsets, inside = _where(n, f // 2, BM, BF // 2, f // 2)
    pair = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
    low, high = tl.split(tl.reshape(pair, (BM, BF // 4, 2)))
    sa, sb = _spread(first, second, low, high, 0), _spread(first, second, low, high, 1)
    sc, sd = _spread(first, second, low, high, 2), _spread(first, second, low, high, 3)
    offsets, inside = _where(n, f, BM, BF, f)
    if NEEDS_S:
        tl.store(s + offsets, _together(sa, sb, sc, sd).to(s.dtype.element_ty), mask=inside)
    if NEEDS_DZ:
        a, b, c, d = neighbours(tl.load(ds + offsets, mask=inside, other=0.0).to(tl.float32))
        a, b = _slope(a, sa, scale, ds, METHOD), _slope(b, sb, scale, ds, METHOD)
        c, d = _slope(c, sc, scale, ds, METHOD), _slope(d, sd, scale, ds, METHOD)
        if METHOD == SOFT_THRESHOLD:
            shift = _as(-(a + b + c + d), ds)
            place = tl.where((code >> 6) != 0, (code >> 4) & 3, 4)
            a, b = a + tl.where(place == 0, shift, 0.0), b + tl.where(place == 1, shift, 0.0)
            c, d = c + tl.where(place == 2, shift, 0.0), d + tl.where(place == 3, shift, 0.0)
        tl.store(dz + offsets, _together(a, b, c, d).to(dz.dtype.element_ty), mask=inside)


@triton.jit
def slope_kernel(rho, ds, dz, n, f, scale, BM: tl.constexpr, BF: tl.constexpr):
    """Grid (tiles of n, tiles of f): `dz = 2·ρ·scale·ds`, `[n, f]`."""
    offsets, inside = _where(n, f, BM, BF, f)
    root = tl.load(rho + offsets, mask=inside, other=0.0).to(tl.float32)
    slope = _as(scale * tl.load(ds + offsets, mask=inside, other=0.0).to(tl.float32), ds)
    tl.store(dz + offsets, tl.where(root == 0, 0.0, slope * (2 * root)).to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _times_root(ds, root, scale, pointer, METHOD: tl.constexpr):
    """`2·root·scale·ds`, with each factor rounded first; 0 where the root is 0, even if ds is infinite."""
    if METHOD == SOFT_THRESHOLD:
        ds = _as(scale * ds, pointer)
    return tl.where(root == 0, 0.0, _as(ds * (2 * root), pointer))


@triton.jit
def step_kernel(
    z, ds, n, f, scale, METHOD: tl.constexpr, STE: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """Grid (tiles of n, tiles of f): `z [n, f]` becomes s and `ds [n, f]` becomes dz."""
    offsets, inside = _where(n, f, BM, BF, f)
    rho = relu(tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32))
    slope = tl.load(ds + offsets, mask=inside, other=0.0).to(tl.float32)
    if METHOD == DENSE:
        tl.store(z + offsets, (rho * rho).to(z.dtype.element_ty), mask=inside)
        tl.store(ds + offsets, _times_root(slope, rho, scale, ds, METHOD).to(ds.dtype.element_ty), mask=inside)
    else:
        a, b, c, d = neighbours(rho)
        keep, third = order(a, b, c, d)
        t = 0.0
        if METHOD == SOFT_THRESHOLD:
            t = _sum_at(third, a, b, c, d)
        ra, rb = tl.where(keep[0], _as(a - t, z), 0.0), tl.where(keep[1], _as(b - t, z), 0.0)
        rc, rd = tl.where(keep[2], _as(c - t, z), 0.0), tl.where(keep[3], _as(d - t, z), 0.0)
        s = _together(
            _square(ra, scale, z, METHOD), _square(rb, scale, z, METHOD),
            _square(rc, scale, z, METHOD), _square(rd, scale, z, METHOD),
        )  # fmt: skip
        tl.store(z + offsets, s.to(z.dtype.element_ty), mask=inside)
        if STE:
            dz = _times_root(slope, rho, scale, ds, METHOD)
        else:
            e, g, h, i = neighbours(slope)
            e, g = _times_root(e, ra, scale, ds, METHOD), _times_root(g, rb, scale, ds, METHOD)
            h, i = _times_root(h, rc, scale, ds, METHOD), _times_root(i, rd, scale, ds, METHOD)
            if METHOD == SOFT_THRESHOLD:
                shift = _as(-(e + g + h + i), ds)
                e = tl.where(third[0] & (a != 0), shift, e)
                g = tl.where(third[1] & (b != 0), shift, g)
                h = tl.where(third[2] & (c != 0), shift, h)
                i = tl.where(third[3] & (d != 0), shift, i)
            dz = _together(e, g, h, i)
        tl.store(ds + offsets, dz.to(ds.dtype.element_ty), mask=inside)
