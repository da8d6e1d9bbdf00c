// prune(relu(z)²) · down for a few tokens, reading only the rows of down whose feature is not zero.
//
// One token's product reads every weight once and computes with it once, so its time is that of reading. 2:4 leaves at
// most half of the features, relu² fewer. Threads share the features, each adds to sums of its own, and these are added
// in the order of the threads.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>

#include "runtime.h"

namespace elas {
namespace {

#ifdef ELAS_X86
#define ELAS_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define ELAS_CLONES
#endif

ELAS_CLONES void add_row(float* __restrict__ sum, const float* __restrict__ row, float s, int64_t r) {
  for (int64_t k = 0; k < r; ++k) sum[k] += s * row[k];
}

ELAS_CLONES void add_row_bf16(float* __restrict__ sum, const uint16_t* __restrict__ row, float s, int64_t r) {
  for (int64_t k = 0; k < r; ++k) {
    const uint32_t wide = uint32_t(row[k]) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    sum[k] += s * x;
  }
}

at::Tensor live_rows(const at::Tensor& z, const at::Tensor& down_t, int64_t mode, double scale) {
  TORCH_CHECK(z.dim() == 2 && down_t.dim() == 2 && z.size(1) == down_t.size(0), "live_rows: z [n, f], down_t [f, r]");
  TORCH_CHECK(z.scalar_type() == down_t.scalar_type() && down_t.is_contiguous(), "live_rows: one dtype, contiguous");
  const bool bf16 = z.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || z.scalar_type() == at::kFloat, "live_rows: float32 or bfloat16");
  const int64_t n = z.size(0), f = z.size(1), r = down_t.size(1);
  at::Tensor s = z.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  Forward t{n, f, float(scale), s.data_ptr<float>(), nullptr, nullptr, 0, nullptr, 0};
  runtime().tile->forward(t, Mode(mode), bf16 ? ROUNDED : F32);
  const float* values = s.data_ptr<float>();
  const int64_t threads = at::get_num_threads(), share = (f + threads - 1) / threads;
  at::Tensor sums = at::zeros({threads, n, r}, s.options());
  float* all = sums.data_ptr<float>();
  const char* weights = static_cast<const char*>(down_t.data_ptr());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* own = all + part * n * r;
      for (int64_t j = part * share; j < std::min(f, (part + 1) * share); ++j)
        for (int64_t i = 0; i < n; ++i) {
          const float value = values[i * f + j];
          if (value == 0) continue;  // NaN is not 0, and stays seen
          if (bf16) add_row_bf16(own + i * r, reinterpret_cast<const uint16_t*>(weights) + j * r, value, r);
          else add_row(own + i * r, reinterpret_cast<const float*>(weights) + j * r, value, r);
        }
    }
  });
  return sums.sum(0).to(z.scalar_type());
}

TORCH_LIBRARY_FRAGMENT(elas_relu2_24_cpu, m) {
  m.def("live_rows(Tensor z, Tensor down_t, int mode, float scale) -> Tensor");
  m.impl("live_rows", c10::DispatchKey::CPU, live_rows);
}

}  // namespace
}  // namespace elas
