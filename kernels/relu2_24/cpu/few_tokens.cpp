// Products of a few tokens, for generating text: their time is that of reading the weights.
//
// live_rows: prune(relu(z)²) · down (· outᵀ), reading only the rows of down whose feature is not zero. 2:4 leaves at most
// half of the features, relu² fewer. Threads share the features, each adds to sums of its own, and these are added in the order
// of the threads.
//
// low_rank: (x · inᵀ) · outᵀ. Rows of `out` are short (the rank), where BLAS spends its time on what comes before and
// after a row. Threads share the rows, so the sums do not depend on their number.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "runtime.h"

namespace elas {
namespace {

#ifdef ELAS_X86
#define ELAS_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define ELAS_CLONES
#endif

constexpr int64_t WIDE = 32;            // sums side by side in a product of a row, for vector units of any width
constexpr int64_t GRAIN_BYTES = 32768;  // of weights, below which a thread more is not worth its start
constexpr int64_t AHEAD_BYTES = 2048;   // what a core asks memory for before it needs it; worth a fifth of the time

// A few cache lines, wherever they are: a prefetch of an address that is not there does nothing.
inline void fetch(const void* where, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(where) + at);
}

inline float widen(uint16_t x) {
  const uint32_t wide = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

constexpr int ROWS = 4;  // added at once, so that the sums are read and written once for all of them

// sum += s[0] · row[0] + …, while the rows to come are asked for.
ELAS_CLONES void add_rows(float* __restrict__ sum, const float* const* row, const float* const* next, const float* s,
                          int64_t r) {
  const float *__restrict__ a = row[0], *__restrict__ b = row[1], *__restrict__ c = row[2], *__restrict__ d = row[3];
  const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
  int64_t k = 0;
  for (; k + WIDE <= r; k += WIDE) {
    for (int q = 0; q < ROWS; ++q) fetch(next[q] + k, WIDE * sizeof(float));
    for (int64_t l = k; l < k + WIDE; ++l) sum[l] += s0 * a[l] + s1 * b[l] + (s2 * c[l] + s3 * d[l]);
  }
  for (; k < r; ++k) sum[k] += s0 * a[k] + s1 * b[k] + (s2 * c[k] + s3 * d[k]);
}

ELAS_CLONES void add_rows_bf16(float* __restrict__ sum, const uint16_t* const* row, const uint16_t* const* next,
                               const float* s, int64_t r) {
  int64_t k = 0;
  for (; k + WIDE <= r; k += WIDE) {
    for (int q = 0; q < ROWS; ++q) {
      fetch(next[q] + k, WIDE * sizeof(uint16_t));
      const uint16_t* __restrict__ from = row[q] + k;
      const float value = s[q];
      for (int64_t l = 0; l < WIDE; ++l) {
        const uint32_t wide = uint32_t(from[l]) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        sum[k + l] += value * x;
      }
    }
  }
  for (; k < r; ++k)
    for (int q = 0; q < ROWS; ++q) sum[k] += s[q] * widen(row[q][k]);
}

// y[j] = x · row j, for `rows` rows of k weights.
ELAS_CLONES void dots(float* __restrict__ y, const float* __restrict__ x, const float* __restrict__ w, int64_t rows,
                      int64_t k) {
  for (int64_t j = 0; j < rows; ++j, w += k) {
    float sums[WIDE] = {};
    int64_t i = 0;
    for (; i + WIDE <= k; i += WIDE) {
      fetch(reinterpret_cast<const char*>(w + i) + AHEAD_BYTES, WIDE * sizeof(float));
      for (int64_t l = 0; l < WIDE; ++l) sums[l] += x[i + l] * w[i + l];
    }
    float sum = 0;
    for (; i < k; ++i) sum += x[i] * w[i];
    for (int64_t half = WIDE / 2; half; half /= 2)
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    y[j] = sum + sums[0];
  }
}

ELAS_CLONES void dots_bf16(float* __restrict__ y, const float* __restrict__ x, const uint16_t* __restrict__ w,
                           int64_t rows, int64_t k) {
  for (int64_t j = 0; j < rows; ++j, w += k) {
    float sums[WIDE] = {};
    int64_t i = 0;
    for (; i + WIDE <= k; i += WIDE) {
      fetch(reinterpret_cast<const char*>(w + i) + AHEAD_BYTES, WIDE * sizeof(uint16_t));
      for (int64_t l = 0; l < WIDE; ++l) {
        const uint32_t wide = uint32_t(w[i + l]) << 16;
        float v;
        std::memcpy(&v, &wide, 4);
        sums[l] += x[i + l] * v;
      }
    }
    float sum = 0;
    for (; i < k; ++i) sum += x[i] * widen(w[i]);
    for (int64_t half = WIDE / 2; half; half /= 2)
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    y[j] = sum + sums[0];
  }
}

bool check_dtype(const at::Tensor& x, const at::Tensor& weight, const char* name) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || x.scalar_type() == at::kFloat, name, ": float32 or bfloat16");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && weight.is_contiguous(), name, ": one dtype, contiguous");
  return bf16;
}

// y [n, o] = x [n, k] · weightᵀ in fp32.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, bool bf16) {
  const int64_t n = x.size(0), k = x.size(1), o = weight.size(0);
  at::Tensor y = at::empty({n, o}, x.options());
  float* out = y.data_ptr<float>();
  const float* in = x.data_ptr<float>();
  const char* weights = static_cast<const char*>(weight.data_ptr());
  const int64_t row_bytes = std::max<int64_t>(1, k * weight.element_size());
  at::parallel_for(0, o, std::max<int64_t>(1, GRAIN_BYTES / row_bytes), [&](int64_t begin, int64_t end) {
    // A few rows at a time, so that a second token finds them in cache.
    const int64_t step = std::max<int64_t>(1, GRAIN_BYTES / 2 / row_bytes);
    for (int64_t j = begin; j < end; j += step)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t rows = std::min(step, end - j);
        const char* from = weights + j * row_bytes;
        if (bf16) dots_bf16(out + i * o + j, in + i * k, reinterpret_cast<const uint16_t*>(from), rows, k);
        else dots(out + i * o + j, in + i * k, reinterpret_cast<const float*>(from), rows, k);
      }
  });
  return y;
}

// u [n, r] · outᵀ in fp32, with u rounded to what a product by itself would return.
at::Tensor times(const at::Tensor& u, const at::Tensor& out, bool bf16, const char* name) {
  TORCH_CHECK(out.dim() == 2 && out.size(1) == u.size(1), name, ": factor_out [o, r]");
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == (bf16 ? at::kBFloat16 : at::kFloat), name,
              ": one dtype, contiguous");
  return product(bf16 ? u.to(at::kBFloat16).to(at::kFloat) : u, out, bf16);
}

at::Tensor live_rows(const at::Tensor& z, const at::Tensor& down_t, int64_t mode, double scale,
                     const std::optional<at::Tensor>& factor_out) {
  TORCH_CHECK(z.dim() == 2 && down_t.dim() == 2 && z.size(1) == down_t.size(0), "live_rows: z [n, f], down_t [f, r]");
  const bool bf16 = check_dtype(z, down_t, "live_rows");
  const int64_t n = z.size(0), f = z.size(1), r = down_t.size(1);
  at::Tensor s = z.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  Forward t{n, f, float(scale), s.data_ptr<float>(), nullptr, nullptr, 0, nullptr, 0};
  runtime().tile->forward(t, Mode(mode), bf16 ? ROUNDED : F32);
  const float* values = s.data_ptr<float>();
  const int64_t threads = at::get_num_threads(), share = (f + threads - 1) / threads;
  at::Tensor sums = at::zeros({threads, n, r}, s.options());
  float* all = sums.data_ptr<float>();
  const char* weights = static_cast<const char*>(down_t.data_ptr());
  const int64_t row_bytes = r * down_t.element_size();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* own = all + part * n * r;
      std::vector<int64_t> live;
      for (int64_t j = part * share; j < std::min(f, (part + 1) * share); ++j) {
        bool is_live = false;
        for (int64_t i = 0; i < n; ++i) is_live |= values[i * f + j] != 0;  // NaN is not 0, and stays seen
        if (is_live) live.push_back(j);
      }
      if (live.empty()) continue;
      // Groups of rows; the last is filled up with one row, times zero. NaN times zero would be seen, so not a dead one.
      const int64_t groups = (int64_t(live.size()) + ROWS - 1) / ROWS;
      auto feature = [&](int64_t q) { return live[std::min<int64_t>(q, live.size() - 1)]; };
      for (int64_t g = 0; g < groups; ++g) {
        const void *row[ROWS], *next[ROWS];
        for (int q = 0; q < ROWS; ++q) {
          row[q] = weights + feature(g * ROWS + q) * row_bytes;
          next[q] = weights + feature(g * ROWS + q + ROWS) * row_bytes;
        }
        for (int64_t i = 0; i < n; ++i) {
          float s[ROWS];
          for (int q = 0; q < ROWS; ++q)
            s[q] = g * ROWS + q < int64_t(live.size()) ? values[i * f + live[g * ROWS + q]] : 0;
          if (bf16)
            add_rows_bf16(own + i * r, reinterpret_cast<const uint16_t* const*>(row),
                          reinterpret_cast<const uint16_t* const*>(next), s, r);
          else
            add_rows(own + i * r, reinterpret_cast<const float* const*>(row),
                     reinterpret_cast<const float* const*>(next), s, r);
        }
      }
    }
  });
  at::Tensor u = sums.sum(0);
  return factor_out ? times(u, *factor_out, bf16, "live_rows").to(z.scalar_type()) : u.to(z.scalar_type());
}

at::Tensor low_rank(const at::Tensor& x, const at::Tensor& in, const at::Tensor& out) {
  TORCH_CHECK(x.dim() == 2 && in.dim() == 2 && x.size(1) == in.size(1), "low_rank: x [n, h], factor_in [r, h]");
  const bool bf16 = check_dtype(x, in, "low_rank");
  return times(product(x.to(at::kFloat).contiguous(), in, bf16), out, bf16, "low_rank").to(x.scalar_type());
}

TORCH_LIBRARY_FRAGMENT(elas_relu2_24_cpu, m) {
  m.def("live_rows(Tensor z, Tensor down_t, int mode, float scale, Tensor? factor_out) -> Tensor");
  m.impl("live_rows", c10::DispatchKey::CPU, live_rows);
  m.def("low_rank(Tensor x, Tensor factor_in, Tensor factor_out) -> Tensor");
  m.impl("low_rank", c10::DispatchKey::CPU, low_rank);
}

}  // namespace
}  // namespace elas
