"""The core `v = prune(relu²(u m_upᵀ)) n_downᵀ` in Triton, forward and backward: nothing f wide is written to memory.

Shapes: `f` features, `n` tokens, `r_in` and `r_out` widths of u and v.

It has the structure of attention without a softmax: u is Q, m_up is K, n_down is V, z the scores.

    forward_kernel  a tile of tokens, over tiles of f:  z   s   v += s n_downᵀ                    2 products
    du_kernel       a tile of tokens, over tiles of f:  z   ds = dv n_down   dz   du += dz m_up   3
    weights_kernel  a tile of f, over tiles of tokens:  z   ds   dm_up += dzᵀ u   dn_down += dvᵀ s  4

These are nine products instead of six, so that nothing f wide is read or written. The backward pass has two kernels, so
that every sum stays in the registers of one program: no atomics, the same bits in every run. If f has fewer tiles than
the chip has room for, several programs of `weights_kernel` split the tokens, and their partial sums are added outside.

Widths that a product sums over are processed in chunks (BI of r_in, BO of r_out), the last padded with zeros. A width
of the output that is wider than a chunk becomes another dimension of the grid, whose programs compute z again. n_down
is passed transposed, `[f, r_out]`, so that its rows can be gathered like m_up's (triton/groups.py).
"""

import triton
import triton.language as tl

from elas.kernels.relu2_24.triton import packed
from elas.kernels.relu2_24.triton.groups import feature_of, pruned, pruned_with_gradient, relu


@triton.jit
def _tile(pointer, rows, end, stride, first, R: tl.constexpr, B: tl.constexpr):
    """Rows `rows`, columns `first` to `first + B` of a matrix of R columns; 0 beyond row `end` and column R."""
    columns = first + tl.arange(0, B)
    inside = (rows < end)[:, None]
    if R % B != 0:
        inside = inside & (columns < R)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(pointer, rows, end, stride, first, R: tl.constexpr, x):
    """Store x where `_tile` would load."""
    columns = first + tl.arange(0, x.shape[1])
    inside = (rows < end)[:, None] & (columns < R)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, rows, x_end, x_stride, w, features, w_end, w_stride, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """`x wᵀ`, fp32 `[rows, features]`, over R columns in chunks of B."""
    sums = tl.zeros((rows.shape[0], features.shape[0]), tl.float32)
    for first in tl.static_range(0, R, B):
        left = _tile(x, rows, x_end, x_stride, first, R, B)
        right = _tile(w, features, w_end, w_stride, first, R, B)
        sums = tl.dot(left, right.T, sums, input_precision=P)
    return sums


@triton.jit
def _rho(z, pointer):
    """ρ in fp32, rounded to the operands' dtype so that it ranks as in the reference."""
    return relu(z.to(pointer.dtype.element_ty).to(tl.float32))


@triton.jit
def _s(z, scale, pointer, METHOD: tl.constexpr, GAP: tl.constexpr, PACKED: tl.constexpr):
    """s of a tile of products, in the dtype of pointer."""
    if PACKED:
        return packed.pruned(z, METHOD, GAP)
    return pruned(_rho(z, pointer), scale, METHOD, GAP).to(pointer.dtype.element_ty)


@triton.jit
def _s_and_dz(z, ds, scale, pointer, METHOD: tl.constexpr, STE: tl.constexpr, GAP: tl.constexpr, PACKED: tl.constexpr):
    """s and dz (PACKED: half of it) of two tiles of products, in the dtype of pointer."""
    if PACKED:
        return packed.pruned_with_gradient(z, ds, METHOD, STE, GAP)
    s, dz = pruned_with_gradient(_rho(z, pointer), ds, scale, METHOD, STE, GAP)
    return s.to(pointer.dtype.element_ty), dz.to(pointer.dtype.element_ty)


@triton.jit
def forward_kernel(
    u, m, n, v, tokens, features, u_stride, m_stride, n_stride, v_stride, scale,
    R_IN: tl.constexpr, R_OUT: tl.constexpr, METHOD: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, GAP: tl.constexpr, P: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n, chunks of r_out): `u [n, r_in]`, `m [f, r_in]`, `n [f, r_out]` → `v [n, r_out]`."""
    token = tl.program_id(0).to(tl.int64) * BM
    out = tl.program_id(1) * BO
    u += token * u_stride
    left = tokens - token.to(tl.int32)
    rows = tl.arange(0, BM)
    sums = tl.zeros((BM, BO), tl.float32)
    for start in range(0, features, BF):
        at = start + feature_of(BF, GAP)
        z = _product(u, rows, left, u_stride, m, at, features, m_stride, R_IN, BI, P)
        s = _s(z, scale, u, METHOD, GAP, PACKED)
        sums = tl.dot(s, _tile(n, at, features, n_stride, out, R_OUT, BO), sums, input_precision=P)
    _put(v + token * v_stride, rows, left, v_stride, out, R_OUT, sums)


@triton.jit
def du_kernel(
    u, m, n, dv, du, tokens, features, u_stride, m_stride, n_stride, dv_stride, du_stride, scale,
    R_IN: tl.constexpr, R_OUT: tl.constexpr, METHOD: tl.constexpr, STE: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, GAP: tl.constexpr, P: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n, chunks of r_in): the forward's operands and `dv [n, r_out]` → `du [n, r_in]`."""
    token = tl.program_id(0).to(tl.int64) * BM
    first = 0
    if R_IN > BI:  # a constant otherwise, so the compiler reuses the tile of m that z has loaded
        first = tl.program_id(1) * BI
    u += token * u_stride
    dv += token * dv_stride
    left = tokens - token.to(tl.int32)
    rows = tl.arange(0, BM)
    sums = tl.zeros((BM, BI), tl.float32)
    for start in range(0, features, BF):
        at = start + feature_of(BF, GAP)
        z = _product(u, rows, left, u_stride, m, at, features, m_stride, R_IN, BI, P)
        ds = _product(dv, rows, left, dv_stride, n, at, features, n_stride, R_OUT, BO, P)
        _, dz = _s_and_dz(z, ds, scale, u, METHOD, STE, GAP, PACKED)
        right = _tile(m, at, features, m_stride, first, R_IN, BI)
        sums = tl.dot(dz, right, sums, input_precision=P)
    if PACKED:
        sums *= packed.HALF
    _put(du + token * du_stride, rows, left, du_stride, first, R_IN, sums)


@triton.jit
def _add_product(sums, x, y, FIRST: tl.constexpr, P: tl.constexpr):
    """`sums + yᵀ x` if FIRST, else its transpose `sums + xᵀ y`: `x [tokens, columns]`, `y [tokens, features]`."""
    if FIRST:
        sums = tl.dot(y.T, x, sums, input_precision=P)
    else:
        sums = tl.dot(x.T, y, sums, input_precision=P)
    return sums


@triton.jit
def weights_kernel(
    u, m, n, dv, dm, dn, tokens, features, share, u_stride, m_stride, n_stride, dv_stride, scale,
    R_IN: tl.constexpr, R_OUT: tl.constexpr, METHOD: tl.constexpr, STE: tl.constexpr, NEEDS_M: tl.constexpr,
    NEEDS_N: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    GAP: tl.constexpr, P: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of f, shares of n, chunks of both r): → `dm [shares, f, r_in]`, `dn [shares, f, r_out]`, fp32.

    One program sums `share` tokens, a multiple of BM.
    """
    at = tl.program_id(0) * BF + feature_of(BF, GAP)
    token = tl.program_id(1).to(tl.int64) * share
    first_in, first_out = 0, 0
    if R_IN > BI or R_OUT > BO:
        first_in, first_out = tl.program_id(2) * BI, tl.program_id(2) * BO
    u += token * u_stride
    dv += token * dv_stride
    left = tl.minimum(tokens - token.to(tl.int32), share)
    # In fp32 features come first: wgmma does not support a transposed fp32 tile; tiles of under 64 rows use mma.
    FIRST: tl.constexpr = u.dtype.element_ty == tl.float32
    m_sums = tl.zeros((BF, BI) if FIRST else (BI, BF), tl.float32)
    n_sums = tl.zeros((BF, BO) if FIRST else (BO, BF), tl.float32)
    for start in range(0, left, BM):
        rows = start + tl.arange(0, BM)
        z = _product(u, rows, left, u_stride, m, at, features, m_stride, R_IN, BI, P)
        dv_tile = _tile(dv, rows, left, dv_stride, first_out, R_OUT, BO)
        if NEEDS_M:
            ds = _product(dv, rows, left, dv_stride, n, at, features, n_stride, R_OUT, BO, P)
            s, dz = _s_and_dz(z, ds, scale, u, METHOD, STE, GAP, PACKED)
            u_tile = _tile(u, rows, left, u_stride, first_in, R_IN, BI)
            m_sums = _add_product(m_sums, u_tile, dz, FIRST, P)
        else:
            s = _s(z, scale, u, METHOD, GAP, PACKED)
        if NEEDS_N:
            n_sums = _add_product(n_sums, dv_tile, s, FIRST, P)
    if PACKED:
        m_sums *= packed.HALF
    plane = tl.program_id(1).to(tl.int64) * features
    if NEEDS_M:
        _put(dm + plane * R_IN, at, features, R_IN, first_in, R_IN, m_sums if FIRST else m_sums.T)
    if NEEDS_N:
        _put(dn + plane * R_OUT, at, features, R_OUT, first_out, R_OUT, n_sums if FIRST else n_sums.T)
