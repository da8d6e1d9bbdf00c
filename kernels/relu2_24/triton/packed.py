"""Groups of four in words of two bf16 numbers: s and dz with packed instructions, of compute capability 9.0 and later.

On an H100 a tile's two products take 0.12 clocks of a processor for each feature of a token (r = 128), and an
instruction on a feature takes 1/64: the nineteen of groups.py cost more than the products. Here a whole group of four
takes about twenty.

A group (a, b, c, d) is P = (a, b) and Q = (c, d), the low half first. Ranks are decided by six comparisons, two at a
time, as masks of 16 bits:

    A = P ≥ Q             a ≥ c, b ≥ d
    B = P ≥ (d, c)        a ≥ d, b ≥ c
    C = (a, c) ≥ (b, d)   a ≥ b, c ≥ d;   N its opposite

and a number is kept if it wins two of its three. The ranked words have +inf for NaN. ReLU is the conversion's own; it
keeps NaN. dz is half of its value, `ρ·ds`, so that the factor 2 is applied once to the sums (`HALF`); ds is rounded to
bf16 first, as where it is a tensor of its own.

Values equal those of groups.py but for that rounding of ds. Interpreted kernels cannot run this file.
"""

import triton
import triton.language as tl

from elas.kernels.relu2_24.triton.groups import DENSE, lanes, unlanes

HALF = tl.constexpr(2.0)
"""What the sums of `dz` from here are multiplied by."""

_RHO = """
    cvt.rn.relu.bf16x2.f32 P, {b}, {a};
    cvt.rn.relu.bf16x2.f32 Q, {d}, {c};
"""
_KEEP = """
    min.bf16x2 X, P, INF;
    min.bf16x2 Y, Q, INF;
    prmt.b32 Z, Y, Y, 0x1032;
    set.ge.u32.bf16x2 A, X, Y;
    set.ge.u32.bf16x2 B, X, Z;
    prmt.b32 Z, X, Y, 0x5410;
    prmt.b32 Y, X, Y, 0x7632;
    set.ge.u32.bf16x2 C, Z, Y;
    set.lt.u32.bf16x2 N, Z, Y;
    prmt.b32 X, C, N, 0x5410;
    prmt.b32 Y, C, N, 0x7632;
    prmt.b32 Z, B, B, 0x1032;
    lop3.b32 K, A, B, X, 0xE8;
    lop3.b32 L, A, Z, Y, 0x2B;
"""
"""Masks K of (a, b) and L of (c, d): the majorities of A, B, X and of ¬A, ¬Z, Y."""
_PRUNE = """
    and.b32 R, P, K;
    and.b32 T, Q, L;
"""
_SQUARE = """
    mul.rn.bf16x2 X, {one}, {one};
    mul.rn.bf16x2 Y, {two}, {two};
    mov.b32 {{$0, $1}}, X;
    mov.b32 {{$2, $3}}, Y;
"""
_SLOPE = """
    cvt.rn.bf16x2.f32 X, {f}, {e};
    cvt.rn.bf16x2.f32 Y, {h}, {g};
    mul.rn.bf16x2 X, X, {one};
    mul.rn.bf16x2 Y, Y, {two};
    set.neu.u32.bf16x2 A, {one}, ZERO;
    set.neu.u32.bf16x2 B, {two}, ZERO;
    and.b32 X, X, A;
    and.b32 Y, Y, B;
    mov.b32 {{$4, $5}}, X;
    mov.b32 {{$6, $7}}, Y;
"""
"""`ρ·ds`, 0 where ρ is 0 even if ds is infinite."""


def _asm(*parts: str, **names: str) -> tl.constexpr:
    head = ".reg .b32 P, Q, X, Y, Z, A, B, C, N, K, L, R, T, INF, ZERO;\n mov.b32 INF, 0x7F807F80;\n mov.b32 ZERO, 0;\n"
    body = "".join(parts)
    for name, value in names.items():
        body = body.replace("{" + name + "}", value)
    return tl.constexpr("{\n" + head + body.replace("{{", "{").replace("}}", "}") + "}")


def _places(first: int, names: str) -> dict[str, str]:
    return {name: f"${first + at}" for at, name in enumerate(names)}


_FORWARD = _places(4, "abcd")
_BACKWARD = _places(8, "abcdefgh")
_DENSE_S = _asm(_RHO, _SQUARE, one="P", two="Q", **_FORWARD)
_PRUNED_S = _asm(_RHO, _KEEP, _PRUNE, _SQUARE, one="R", two="T", **_FORWARD)
_DENSE_BOTH = _asm(_RHO, _SQUARE, _SLOPE, one="P", two="Q", **_BACKWARD)
_MASKED_BOTH = _asm(_RHO, _KEEP, _PRUNE, _SQUARE, _SLOPE, one="R", two="T", **_BACKWARD)
_STE_BOTH = _asm(
    _RHO, _KEEP, _PRUNE, _SQUARE.replace("{one}", "R").replace("{two}", "T"), _SLOPE, one="P", two="Q", **_BACKWARD
)
_S = tl.constexpr("=h,=h,=h,=h,f,f,f,f")
_BOTH = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,f,f,f,f,f,f,f,f")


@triton.jit
def _four(code: tl.constexpr, a, b, c, d):
    return tl.inline_asm_elementwise(
        code, _S, [a, b, c, d], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )


@triton.jit
def _eight(code: tl.constexpr, a, b, c, d, e, f, g, h):
    return tl.inline_asm_elementwise(
        code, _BOTH, [a, b, c, d, e, f, g, h],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pruned(z, METHOD: tl.constexpr, GAP: tl.constexpr):
    """s, bf16 `[m, b]`, of a tile z in fp32 in the order of `feature_of`: dense or by magnitude."""
    a, b, c, d = lanes(z, GAP)
    if METHOD == DENSE:
        a, b, c, d = _four(_DENSE_S, a, b, c, d)
    else:
        a, b, c, d = _four(_PRUNED_S, a, b, c, d)
    return unlanes(a, b, c, d, GAP)


@triton.jit
def pruned_with_gradient(z, ds, METHOD: tl.constexpr, STE: tl.constexpr, GAP: tl.constexpr):
    """s and dz / 2, bf16 `[m, b]`, of two tiles in fp32 in the order of `feature_of`."""
    a, b, c, d = lanes(z, GAP)
    e, f, g, h = lanes(ds, GAP)
    if METHOD == DENSE:
        a, b, c, d, e, f, g, h = _eight(_DENSE_BOTH, a, b, c, d, e, f, g, h)
    elif STE:
        a, b, c, d, e, f, g, h = _eight(_STE_BOTH, a, b, c, d, e, f, g, h)
    else:
        a, b, c, d, e, f, g, h = _eight(_MASKED_BOTH, a, b, c, d, e, f, g, h)
    return unlanes(a, b, c, d, GAP), unlanes(e, f, g, h, GAP)
