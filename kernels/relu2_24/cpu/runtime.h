// What both product paths share: choices made at run time, buffers that stay, and how work is cut.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "tile.h"

namespace elas {

// Chosen once (tests choose otherwise): the element-wise code, whether bf16 products go to oneDNN's brgemm, and whether
// buffers are filled with NaN before use.
struct Runtime {
  const Tile* tile;
  bool brgemm;
  bool poison = false;
};
Runtime& runtime();

// Memory that outlives a call, one a thread and slot: a fresh large buffer faults on every page. `slot` keeps buffers
// that are used at once apart.
void* scratch(int slot, size_t bytes);

template <class T>
T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch(slot, sizeof(T) * size_t(count)));
}

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// n tokens in chunks of `tokens`, f features in blocks of `features`, with work for every thread.
struct Cut {
  int64_t tokens, features, chunks, blocks;
  Cut(int64_t n, int64_t f, int64_t want_tokens, int64_t want_features, int64_t threads) {
    tokens = std::min(want_tokens, std::max<int64_t>(32, round_up((n + threads - 1) / threads, 32)));
    chunks = (n + tokens - 1) / tokens;
    int64_t count = round_up((f + want_features - 1) / want_features, threads);
    features = round_up((f + count - 1) / count, 16);
    blocks = (f + features - 1) / features;
  }
};

// Operands of both passes, tokens as rows, contiguous. `values` and `codes` are undefined in fused memory.
struct Core {
  at::Tensor u, m_up, n_down, values, codes;
  Mode mode;
  float scale;
  int64_t n() const { return u.size(0); }
  int64_t f() const { return m_up.size(0); }
  int64_t r_in() const { return u.size(1); }
  int64_t r_out() const { return n_down.size(0); }

  // The kept tensors at the corner of a tile.
  template <class Part>
  void place_kept(Part& t, int64_t token, int64_t feature) const {
    if (!values.defined()) return;
    int64_t column = packs(mode) ? feature / 2 : feature;
    t.kept_ld = values.size(1);
    t.kept = static_cast<char*>(values.data_ptr()) + (token * t.kept_ld + column) * values.element_size();
    if (!packs(mode)) return;
    t.codes_ld = codes.size(1);
    t.codes = codes.data_ptr<uint8_t>() + token * t.codes_ld + feature / (mode == MAGNITUDE_MASKED ? 8 : 4);
  }
};

struct Gradients {
  at::Tensor du, dm_up, dn_down;  // undefined where not wanted
};

// fp32 products (products_f32.cpp). `bf16_values`: the numbers in fp32 tensors are bf16, and are rounded to it.
at::Tensor forward_f32(const Core&, bool bf16_values);
Gradients backward_f32(const Core&, const at::Tensor& dv, bool want_u, bool want_m, bool want_n, bool bf16_values);

// bf16 products with fp32 sums (products_bf16.cpp).
bool bf16_products_run();                  // whether this machine has them
bool bf16_products_fit(const Core&);       // whether they are chosen and take these widths
at::Tensor forward_bf16(const Core&);
Gradients backward_bf16(const Core&, const at::Tensor& dv, bool want_u, bool want_m, bool want_n);

}  // namespace elas
