// Both passes with fp32 products by ATen, one thread a tile.
//
// Forward: threads share the chunks of tokens, each its own rows of v. Backward: threads share the blocks of features,
// each its own rows of dm_up and columns of dn_down, and adds to a du of its own; these are summed at the end, always
// in the same order for a given number of threads.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "runtime.h"

namespace elas {
namespace {

constexpr int64_t TOKENS = 512, FEATURES = 512;

// out = a·b, or out += a·b.
void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (add) at::addmm_out(out, out, a, b);
  else at::mm_out(out, a, b);
}

at::Tensor tile_of(int slot, int64_t rows, int64_t cols) {
  return at::from_blob(scratch<float>(slot, TOKENS * FEATURES), {rows, cols}, at::kFloat);
}

}  // namespace

at::Tensor forward_f32(const Core& core, bool bf16_values) {
  const Cut cut(core.n(), core.f(), TOKENS, FEATURES, at::get_num_threads());
  at::Tensor v = at::empty({core.n(), core.r_out()}, core.u.options());
  at::parallel_for(0, cut.chunks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t i = chunk * cut.tokens, rows = std::min(cut.tokens, core.n() - i);
      at::Tensor u = core.u.narrow(0, i, rows), out = v.narrow(0, i, rows);
      for (int64_t j = 0; j < core.f(); j += cut.features) {
        const int64_t cols = std::min(cut.features, core.f() - j);
        at::Tensor z = tile_of(0, rows, cols);
        product(z, u, core.m_up.narrow(0, j, cols).t(), false);
        Forward t{rows, cols, core.scale, z.data_ptr<float>(), nullptr, nullptr, 0, nullptr, 0};
        core.place_kept(t, i, j);
        runtime().tile->forward(t, core.mode, bf16_values ? ROUNDED : F32);
        product(out, z, core.n_down.narrow(1, j, cols).t(), j > 0);
      }
    }
  });
  return v;
}

Gradients backward_f32(const Core& core, const at::Tensor& dv, bool want_u, bool want_m, bool want_n, bool bf16_values) {
  const int64_t threads = at::get_num_threads();
  const Cut cut(core.n(), core.f(), TOKENS, FEATURES, threads);
  Gradients g;
  if (want_m) g.dm_up = at::empty_like(core.m_up);
  if (want_n) g.dn_down = at::empty_like(core.n_down);
  std::vector<at::Tensor> parts(threads);
  if (want_u) {
    parts[0] = g.du = at::empty_like(core.u);
    const int64_t size = core.u.numel();
    float* rest = scratch<float>(2, size * (threads - 1));
    for (int64_t k = 1; k < threads; ++k) parts[k] = at::from_blob(rest + (k - 1) * size, core.u.sizes(), at::kFloat);
  }
  std::vector<char> used(threads, 0);
  at::parallel_for(0, cut.blocks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const int me = at::get_thread_num();
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j = block * cut.features, cols = std::min(cut.features, core.f() - j);
      at::Tensor m_up = core.m_up.narrow(0, j, cols), n_down = core.n_down.narrow(1, j, cols);
      for (int64_t i = 0; i < core.n(); i += cut.tokens) {
        const int64_t rows = std::min(cut.tokens, core.n() - i);
        at::Tensor u = core.u.narrow(0, i, rows), dv_rows = dv.narrow(0, i, rows);
        at::Tensor s = tile_of(0, rows, cols), dz = tile_of(1, rows, cols);
        Backward t{};
        t.rows = rows, t.cols = cols, t.scale = core.scale;
        t.s = s.data_ptr<float>(), t.ds = t.dz = dz.data_ptr<float>();
        if (core.values.defined()) core.place_kept(t, i, j);
        else product(s, u, m_up.t(), false), t.z = t.s;
        if (want_u || want_m) product(dz, dv_rows, n_down, false);
        else dz.zero_();
        runtime().tile->backward(t, core.mode, bf16_values ? ROUNDED : F32);
        if (want_n) product(g.dn_down.narrow(1, j, cols), dv_rows.t(), s, i > 0);
        if (want_m) product(g.dm_up.narrow(0, j, cols), dz.t(), u, i > 0);
        if (want_u) product(parts[me].narrow(0, i, rows), dz, m_up, block > begin);
      }
    }
    used[me] = 1;
  });
  if (want_u) {
    if (!used[0]) g.du.zero_();
    for (int64_t k = 1; k < threads; ++k)
      if (used[k]) g.du.add_(parts[k]);
  }
  return g;
}

}  // namespace elas
