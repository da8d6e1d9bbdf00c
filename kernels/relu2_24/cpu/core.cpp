// The operators `elas_relu2_24_cpu::*`: operands checked and made contiguous, the product path chosen.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace elas {
namespace {

const Tile* find_tile(const std::string& isa) {
#ifdef ELAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if ((isa == "auto" || isa == "avx512") && avx512) return &tile_avx512;
  if ((isa == "auto" || isa == "avx2") && __builtin_cpu_supports("avx2")) return &tile_avx2;
#endif
  return isa == "auto" || isa == "scalar" ? &tile_scalar : nullptr;
}

std::string isa_name() {
#ifdef ELAS_X86
  if (runtime().tile == &tile_avx512) return "avx512";
  if (runtime().tile == &tile_avx2) return "avx2";
#endif
  return "scalar";
}

// Tests call it; false where this machine has no such instruction set or products.
bool configure(std::string isa, bool brgemm, bool poison) {
  const Tile* tile = find_tile(isa);
  if (!tile) return false;
  const bool can = bf16_products_run();
  runtime() = {tile, brgemm && can, poison};
  return can || !brgemm;
}

std::string description() {
  return isa_name() + ", bf16 products by " + (runtime().brgemm ? "brgemm" : "fp32 gemm");
}

Core core_of(const at::Tensor& u, const at::Tensor& m_up, const at::Tensor& n_down, int64_t mode, double scale) {
  return {u.contiguous(), m_up.contiguous(), n_down.contiguous(), {}, {}, Mode(mode), float(scale)};
}

// The core with its matrices in fp32; kept tensors stay as they are.
Core widened(Core core) {
  core.u = core.u.to(at::kFloat), core.m_up = core.m_up.to(at::kFloat), core.n_down = core.n_down.to(at::kFloat);
  return core;
}

std::vector<at::Tensor> forward(const at::Tensor& u, const at::Tensor& m_up, const at::Tensor& n_down, int64_t mode,
                                double scale, bool keep) {
  Core core = core_of(u, m_up, n_down, mode, scale);
  const int64_t n = core.n(), f = core.f(), groups = f / 4;
  std::vector<at::Tensor> out{at::Tensor()};
  if (keep) {
    const bool packed = packs(core.mode);
    out.push_back(core.values = at::empty({n, packed ? f / 2 : f}, u.options()));
    if (packed) {
      const int64_t bytes = core.mode == MAGNITUDE_MASKED ? (groups + 1) / 2 : groups;
      out.push_back(core.codes = at::empty({n, bytes}, u.options().dtype(at::kByte)));
    }
  }
  if (u.scalar_type() == at::kFloat) out[0] = forward_f32(core, false);
  else if (bf16_products_fit(core)) out[0] = forward_bf16(core);
  else out[0] = forward_f32(widened(core), true).to(at::kBFloat16);
  return out;
}

std::vector<at::Tensor> backward(const at::Tensor& u, const at::Tensor& m_up, const at::Tensor& n_down,
                                 at::TensorList kept, const at::Tensor& dv, int64_t mode, double scale, bool want_u,
                                 bool want_m, bool want_n) {
  Core core = core_of(u, m_up, n_down, mode, scale);
  if (kept.size() > 0) core.values = kept[0].contiguous();
  if (kept.size() > 1) core.codes = kept[1].contiguous();
  const at::Tensor dv_rows = dv.contiguous();
  Gradients g;
  if (u.scalar_type() == at::kFloat) g = backward_f32(core, dv_rows, want_u, want_m, want_n, false);
  else if (bf16_products_fit(core)) g = backward_bf16(core, dv_rows, want_u, want_m, want_n);
  else g = backward_f32(widened(core), dv_rows.to(at::kFloat), want_u, want_m, want_n, true);
  std::vector<at::Tensor> out;
  for (const at::Tensor& x : {g.du, g.dm_up, g.dn_down})
    out.push_back(x.defined() ? x.to(u.scalar_type()) : at::empty({0}, u.options()));
  return out;
}

}  // namespace

Runtime& runtime() {
  static Runtime chosen{find_tile("auto"), bf16_products_run()};
  return chosen;
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
  };
  static thread_local std::vector<Buffer> buffers(16);
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    b.memory.reset();
    b.memory.reset(new char[bytes + 64]);
    b.size = bytes;
  }
  char* p = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(b.memory.get()), 64));
  if (runtime().poison) std::fill(p, p + bytes, char(0xff));  // NaN in fp32 and in bf16
  return p;
}

TORCH_LIBRARY(elas_relu2_24_cpu, m) {
  m.def("forward(Tensor u, Tensor m_up, Tensor n_down, int mode, float scale, bool keep) -> Tensor[]");
  m.def(
      "backward(Tensor u, Tensor m_up, Tensor n_down, Tensor[] kept, Tensor dv, int mode, float scale, bool want_u, "
      "bool want_m, bool want_n) -> Tensor[]");
  m.impl("forward", c10::DispatchKey::CPU, forward);
  m.impl("backward", c10::DispatchKey::CPU, backward);
  m.def("configure(str isa, bool brgemm, bool poison) -> bool", configure);
  m.def("description() -> str", description);
}

}  // namespace elas
