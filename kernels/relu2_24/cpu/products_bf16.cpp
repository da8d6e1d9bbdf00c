// Both passes with bf16 products and fp32 sums by oneDNN's brgemm, one thread a tile.
//
// brgemm multiplies row-major A by B whose rows are interleaved in pairs ("VNNI": a 32-bit word holds rows 2k and 2k+1
// of one column). So each operand is written once as its product wants it: weights per block of features; u and dv
// transposed per chunk of tokens; s and dz by the element-wise code, which has two tokens in hand. No product result
// is f wide beyond a tile, and weight gradients are summed over all tokens in fp32 before they are rounded.
//
//   forward    z = u · pairs(m_upᵀ)         v += s · pairs(n_downᵀ)
//   backward   ds = dv · pairs(n_down)      du += dz · pairs(m_up)
//              dm_upᵀ += uᵀ · pairs(dz)     dn_down += dvᵀ · pairs(s)

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <exception>
#include <vector>

#include "runtime.h"

namespace elas {
namespace {

using at::BFloat16;
constexpr int64_t TOKENS = 512, FEATURES = 512;

enum Slot { Z, DS, S, DZ, DZ_ROWS, SUM_M, SUM_N, B_Z, B_V, B_DS, B_DU, U_T, DV_T, DU_PARTS };

const uint16_t* raw(const at::Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }
uint16_t* raw_out(const at::Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }

// C [m, n] (+)= A [m, k] · B [k, n], B in pairs.
void product(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint32_t* b, float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, n, n, add, reinterpret_cast<const BFloat16*>(a),
                              reinterpret_cast<const BFloat16*>(b), c, /*is_vnni=*/true);
}

uint16_t to_bf16(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  const uint32_t rounded = (y + 0x7fffu + (y >> 16 & 1)) >> 16, quiet = (y | 0x400000u) >> 16;
  return x != x ? quiet : rounded;
}

// pairs(xᵀ): x [rows, 2·half] of row stride ld, as words [half, rows]. A word of xᵀ's pairs is a word of x.
void pairs_of_transpose(const uint16_t* x, int64_t ld, int64_t rows, int64_t half, uint32_t* out) {
  constexpr int64_t B = 16;
  for (int64_t i = 0; i < rows; i += B)
    for (int64_t k = 0; k < half; ++k)
      for (int64_t ii = i; ii < std::min(i + B, rows); ++ii) std::memcpy(&out[k * rows + ii], x + ii * ld + 2 * k, 4);
}

// pairs(x): x [2·half, cols] of row stride ld, as words [half, cols].
void pairs(const uint16_t* x, int64_t ld, int64_t half, int64_t cols, uint32_t* out) {
  for (int64_t k = 0; k < half; ++k) {
    const uint16_t *even = x + 2 * k * ld, *odd = even + ld;
    for (int64_t j = 0; j < cols; ++j) out[k * cols + j] = even[j] | uint32_t(odd[j]) << 16;
  }
}

// xᵀ of x [rows, cols], as [cols, to_rows] with zeros beyond rows.
void transpose(const uint16_t* x, int64_t rows, int64_t cols, int64_t to_rows, uint16_t* out) {
  constexpr int64_t B = 32;
  for (int64_t k = 0; k < cols; k += B)
    for (int64_t i = 0; i < to_rows; i += B)
      for (int64_t kk = k; kk < std::min(k + B, cols); ++kk)
        for (int64_t ii = i; ii < std::min(i + B, to_rows); ++ii) out[kk * to_rows + ii] = ii < rows ? x[ii * cols + kk] : 0;
}

void round_rows(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(x[i]);
}

}  // namespace

bool bf16_products_run() {
  alignas(64) uint16_t a[32 * 32] = {};
  alignas(64) uint32_t b[16 * 32] = {};
  alignas(64) float c[32 * 32];
  try {
    product(32, 32, 32, a, 32, b, c, false);
    at::native::cpublas::brgemm_release(true);
    return true;
  } catch (const std::exception&) {  // neither AMX nor AVX512-BF16, or a PyTorch without oneDNN's kernels
    return false;
  }
}

bool bf16_products_fit(const Core& core) {
  return runtime().brgemm && core.f() % 2 == 0 && core.r_in() % 2 == 0 && core.r_out() % 2 == 0;
}

at::Tensor forward_bf16(const Core& core) {
  const int64_t n = core.n(), f = core.f(), r_in = core.r_in(), r_out = core.r_out();
  const Cut cut(n, f, TOKENS, FEATURES, at::get_num_threads());
  at::Tensor v = at::empty({n, r_out}, core.u.options());
  const uint16_t *u = raw(core.u), *m_up = raw(core.m_up), *n_down = raw(core.n_down);
  uint32_t* b_z = scratch<uint32_t>(B_Z, f * r_in / 2);
  uint32_t* b_v = scratch<uint32_t>(B_V, f * r_out / 2);
  at::parallel_for(0, cut.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j = block * cut.features, cols = std::min(cut.features, f - j);
      pairs_of_transpose(m_up + j * r_in, r_in, cols, r_in / 2, b_z + j * r_in / 2);
      pairs_of_transpose(n_down + j, f, r_out, cols / 2, b_v + j * r_out / 2);
    }
  });
  at::parallel_for(0, cut.chunks, 1, [&](int64_t begin, int64_t end) {
    float* z = scratch<float>(Z, cut.tokens * cut.features);
    uint16_t* s = scratch<uint16_t>(S, cut.tokens * cut.features);
    float* sum = scratch<float>(SUM_N, cut.tokens * r_out);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t i = chunk * cut.tokens, rows = std::min(cut.tokens, n - i);
      for (int64_t j = 0; j < f; j += cut.features) {
        const int64_t cols = std::min(cut.features, f - j);
        product(rows, cols, r_in, u + i * r_in, r_in, b_z + j * r_in / 2, z, false);
        Forward t{rows, cols, core.scale, z, s, nullptr, 0, nullptr, 0};
        core.place_kept(t, i, j);
        runtime().tile->forward(t, core.mode, BF16);
        product(rows, r_out, cols, s, cols, b_v + j * r_out / 2, sum, j > 0);
      }
      round_rows(sum, rows * r_out, raw_out(v) + i * r_out);
    }
    at::native::cpublas::brgemm_release(true);
  });
  return v;
}

Gradients backward_bf16(const Core& core, const at::Tensor& dv_rows, bool want_u, bool want_m, bool want_n) {
  const int64_t n = core.n(), f = core.f(), r_in = core.r_in(), r_out = core.r_out();
  const int64_t threads = at::get_num_threads();
  const Cut cut(n, f, TOKENS, FEATURES, threads);
  const bool want_dz = want_u || want_m, recompute = !core.values.defined();
  Gradients g;
  if (want_u) g.du = at::empty_like(core.u);
  if (want_m) g.dm_up = at::empty_like(core.m_up);
  if (want_n) g.dn_down = at::empty_like(core.n_down);
  const uint16_t *u = raw(core.u), *dv = raw(dv_rows), *m_up = raw(core.m_up), *n_down = raw(core.n_down);
  const int64_t even = round_up(cut.tokens, 2);
  uint16_t* u_t = scratch<uint16_t>(U_T, cut.chunks * even * r_in);
  uint16_t* dv_t = scratch<uint16_t>(DV_T, cut.chunks * even * r_out);
  at::parallel_for(0, cut.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t i = chunk * cut.tokens, rows = std::min(cut.tokens, n - i), to_rows = round_up(rows, 2);
      if (want_m) transpose(u + i * r_in, rows, r_in, to_rows, u_t + chunk * even * r_in);
      if (want_n) transpose(dv + i * r_out, rows, r_out, to_rows, dv_t + chunk * even * r_out);
    }
  });
  float* du_parts = want_u ? scratch<float>(DU_PARTS, threads * n * r_in) : nullptr;
  std::vector<char> used(threads, 0);
  at::parallel_for(0, cut.blocks, 1, [&](int64_t begin, int64_t end) {
    const int me = at::get_thread_num();
    const int64_t tile = cut.tokens * cut.features;
    float *z = scratch<float>(Z, tile), *ds = scratch<float>(DS, tile);
    uint32_t *s = scratch<uint32_t>(S, tile / 2), *dz = scratch<uint32_t>(DZ, tile / 2);
    uint16_t* dz_rows = scratch<uint16_t>(DZ_ROWS, tile);
    float *sum_m = scratch<float>(SUM_M, r_in * cut.features), *sum_n = scratch<float>(SUM_N, r_out * cut.features);
    uint32_t *b_z = scratch<uint32_t>(B_Z, r_in * cut.features / 2), *b_du = scratch<uint32_t>(B_DU, r_in * cut.features / 2);
    uint32_t* b_ds = scratch<uint32_t>(B_DS, r_out * cut.features / 2);
    if (!want_dz) std::memset(ds, 0, sizeof(float) * tile);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j = block * cut.features, cols = std::min(cut.features, f - j);
      if (recompute) pairs_of_transpose(m_up + j * r_in, r_in, cols, r_in / 2, b_z);
      if (want_dz) pairs(n_down + j, f, r_out / 2, cols, b_ds);
      if (want_u) pairs(m_up + j * r_in, r_in, cols / 2, r_in, b_du);
      for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
        const int64_t i = chunk * cut.tokens, rows = std::min(cut.tokens, n - i), to_rows = round_up(rows, 2);
        if (recompute) product(rows, cols, r_in, u + i * r_in, r_in, b_z, z, false);
        if (want_dz) product(rows, cols, r_out, dv + i * r_out, r_out, b_ds, ds, false);
        Backward t{};
        t.rows = rows, t.cols = cols, t.scale = core.scale;
        t.z = recompute ? z : nullptr, t.ds = ds;
        t.s_pairs = s, t.dz_pairs = dz, t.dz_rows = dz_rows;
        core.place_kept(t, i, j);
        runtime().tile->backward(t, core.mode, BF16);
        if (want_n) product(r_out, cols, to_rows, dv_t + chunk * even * r_out, to_rows, s, sum_n, i > 0);
        if (want_m) product(r_in, cols, to_rows, u_t + chunk * even * r_in, to_rows, dz, sum_m, i > 0);
        if (want_u) product(rows, r_in, cols, dz_rows, cols, b_du, du_parts + (me * n + i) * r_in, block > begin);
      }
      if (want_n)
        for (int64_t k = 0; k < r_out; ++k) round_rows(sum_n + k * cols, cols, raw_out(g.dn_down) + k * f + j);
      if (want_m) {
        uint16_t* out = raw_out(g.dm_up) + j * r_in;
        for (int64_t k0 = 0; k0 < r_in; k0 += 16)
          for (int64_t c = 0; c < cols; ++c)
            for (int64_t k = k0; k < std::min(k0 + 16, r_in); ++k) out[c * r_in + k] = to_bf16(sum_m[k * cols + c]);
      }
    }
    at::native::cpublas::brgemm_release(true);
    used[me] = 1;
  });
  if (want_u) {
    at::parallel_for(0, n * r_in, 1 << 14, [&](int64_t begin, int64_t end) {
      uint16_t* out = raw_out(g.du);
      int64_t first = 0;
      while (!used[first]) ++first;
      for (int64_t k = first + 1; k < threads; ++k)
        if (used[k])
          for (int64_t x = begin; x < end; ++x) du_parts[first * n * r_in + x] += du_parts[k * n * r_in + x];
      round_rows(du_parts + first * n * r_in + begin, end - begin, out + begin);
    });
  }
  return g;
}

}  // namespace elas
