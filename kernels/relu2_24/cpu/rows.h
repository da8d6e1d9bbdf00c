// The element-wise code of both passes, over whichever `Simd` was included before; one translation unit an
// instruction set. Order within a group, rounding and packed layout are those of pack.py and plain/compressed.py.

#define INLINE static inline __attribute__((always_inline))

using F = Simd::F;
using M = Simd::M;
constexpr int W = Simd::W;

template <Kind KIND>
struct Stored {
  using T = uint16_t;
};
template <>
struct Stored<F32> {
  using T = float;
};

constexpr bool is_soft(Mode mode) { return mode == SOFT_MASKED || mode == SOFT_STE; }

// One byte of keep-bits (two groups) to its code byte, and back.
struct Codes {
  uint8_t encode[256], decode[256];
  constexpr Codes() : encode(), decode() {
    for (int b = 0; b < 256; ++b) {
      int code = 0, keep = 0;
      for (int half = 0; half < 2; ++half) {
        int group = b >> 4 * half & 15, found = 0, nibble = 0;
        for (int i = 0; i < 4 && found < 2; ++i)
          if (group >> i & 1) nibble |= i << 2 * found++;
        code |= nibble << 4 * half;
        keep |= (1 << (group & 3) | 1 << (group >> 2)) << 4 * half;
      }
      encode[b] = code;
      decode[b] = keep;
    }
  }
};
constexpr Codes CODES;

struct Pruned {
  F s, root;      // root: what the gradient is 2·root·ds of
  M keep, third;
  M shift;        // the third where it is above 0: what else the threshold's gradient goes to (SOFT_MASKED)
};

template <Kind KIND>
INLINE F rounded(F a) {
  return KIND == F32 ? a : Simd::round(a);
}

template <Mode MODE, Kind KIND>
INLINE Pruned prune(F z, float scale) {
  Pruned p{};
  F rho = Simd::relu(z);
  if (MODE == DENSE) {
    p.s = rounded<KIND>(Simd::mul(rho, rho));
    p.root = rho;
    return p;
  }
  Simd::I key = Simd::key(rho);
  M a = Simd::beats<1>(key), b = Simd::beats<2>(key), c = Simd::beats<3>(key);
  p.keep = M((a & b) | (c & (a | b)));
  if (!is_soft(MODE)) {
    F kept = Simd::maskz(p.keep, rho);
    p.s = rounded<KIND>(Simd::mul(kept, kept));
    p.root = MODE == MAGNITUDE_STE ? rho : kept;
    return p;
  }
  p.third = M((a ^ b ^ c) & ~(a & b & c));
  F t = Simd::group_sum(Simd::maskz(p.third, rho));
  F excess = Simd::maskz(p.keep, Simd::sub(rho, t));
  p.s = rounded<KIND>(Simd::mul(Simd::set(scale), Simd::mul(excess, excess)));
  p.root = MODE == SOFT_STE ? rho : excess;
  p.shift = M(p.third & Simd::nonzero(rho));
  return p;
}

template <Mode MODE, class T>
INLINE void keep_packed(const Forward& t, int64_t row, int64_t j, int n, const Pruned& p) {
  uint32_t lanes = n == W ? (1u << (W - 1)) * 2 - 1 : (1u << n) - 1;
  uint32_t keep = Simd::bits(p.keep) & lanes;
  Simd::compress((T*)t.kept + row * t.kept_ld + j / 2, p.s, keep, n);
  uint8_t* codes = t.codes + row * t.codes_ld;
  if (MODE == MAGNITUDE_MASKED) {
    for (int k = 0; 8 * k < n; ++k) codes[j / 8 + k] = CODES.encode[keep >> 8 * k & 255];
    return;
  }
  uint32_t third = Simd::bits(p.third), shift = Simd::bits(p.shift);
  for (int g = 0; 4 * g < n; ++g) {
    int positive = (shift >> 4 * g & 15) != 0;
    codes[j / 4 + g] = CODES.encode[keep >> 4 * g & 15] | __builtin_ctz(third >> 4 * g & 15) << 4 | positive << 6;
  }
}

template <Mode MODE, Kind KIND>
INLINE void forward_lanes(const Forward& t, int64_t row, int64_t j, int n) {
  using T = typename Stored<KIND>::T;
  float* z = t.z + row * t.cols + j;
  Pruned p = prune<MODE, KIND>(rounded<KIND>(Simd::load(z, n)), t.scale);
  if (KIND == BF16) Simd::store(t.s_rows + row * t.cols + j, p.s, n);
  else Simd::store(z, p.s, n);
  if (!t.kept) return;
  if (packs(MODE)) keep_packed<MODE, T>(t, row, j, n, p);
  else Simd::store((T*)t.kept + row * t.kept_ld + j, p.root, n);
}

template <Mode MODE, Kind KIND>
void forward_tile(const Forward& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    int64_t j = 0;
    for (; j + W <= t.cols; j += W) forward_lanes<MODE, KIND>(t, row, j, W);
    if (j < t.cols) forward_lanes<MODE, KIND>(t, row, j, int(t.cols - j));
  }
}

template <Mode MODE, Kind KIND>
INLINE Pruned unpack(const Backward& t, int64_t row, int64_t j, int n) {
  using T = typename Stored<KIND>::T;
  const uint8_t* codes = t.codes + row * t.codes_ld;
  uint32_t keep = 0, shift = 0;
  if (MODE == MAGNITUDE_MASKED) {
    for (int k = 0; 8 * k < n; ++k) keep |= uint32_t(CODES.decode[codes[j / 8 + k]]) << 8 * k;
  } else {
    for (int g = 0; 4 * g < n; ++g) {
      uint32_t code = codes[j / 4 + g];
      keep |= uint32_t(CODES.decode[code & 15] & 15) << 4 * g;
      shift |= (code >> 6 & 1) << (code >> 4 & 3) << 4 * g;
    }
  }
  if (n < W) keep &= (1u << n) - 1;
  Pruned p{};
  p.s = Simd::expand((const T*)t.kept + row * t.kept_ld + j / 2, keep, n);
  F square = MODE == MAGNITUDE_MASKED ? p.s : Simd::div(p.s, Simd::set(t.scale));
  p.root = Simd::sqrt(square);
  if (MODE == MAGNITUDE_MASKED) p.root = rounded<KIND>(p.root);  // relu(z) itself
  p.shift = Simd::from_bits(shift);
  return p;
}

template <Mode MODE, Kind KIND, bool KEPT>
INLINE void backward_lanes(const Backward& t, int64_t row, int64_t j, int n, F& s, F& dz) {
  using T = typename Stored<KIND>::T;
  Pruned p;
  if constexpr (!KEPT) p = prune<MODE, KIND>(rounded<KIND>(Simd::load(t.z + row * t.cols + j, n)), t.scale);
  else if constexpr (packs(MODE)) p = unpack<MODE, KIND>(t, row, j, n);
  else p = prune<MODE, KIND>(Simd::load((const T*)t.kept + row * t.kept_ld + j, n), t.scale);
  s = p.s;
  F ds = Simd::load(t.ds + row * t.cols + j, n);
  if (is_soft(MODE)) ds = Simd::mul(Simd::set(t.scale), ds);
  dz = Simd::maskz(Simd::nonzero(p.root), Simd::mul(ds, Simd::add(p.root, p.root)));
  if (MODE == SOFT_MASKED) dz = Simd::select(p.shift, Simd::sub(Simd::set(0), Simd::group_sum(dz)), dz);
  dz = rounded<KIND>(dz);
}

template <Mode MODE, Kind KIND, bool KEPT>
INLINE void backward_store(const Backward& t, int64_t row, int64_t j, int n) {
  F s, dz;
  backward_lanes<MODE, KIND, KEPT>(t, row, j, n, s, dz);
  Simd::store(t.s + row * t.cols + j, s, n);
  Simd::store(t.dz + row * t.cols + j, dz, n);
}

template <Mode MODE, Kind KIND, bool KEPT>
INLINE void backward_pair(const Backward& t, int64_t row, int64_t j, int n) {
  F s0, dz0, s1 = Simd::set(0), dz1 = Simd::set(0);
  backward_lanes<MODE, KIND, KEPT>(t, row, j, n, s0, dz0);
  if (row + 1 < t.rows) backward_lanes<MODE, KIND, KEPT>(t, row + 1, j, n, s1, dz1);
  Simd::store_pairs(t.s_pairs + row / 2 * t.cols + j, s0, s1, n);
  Simd::store_pairs(t.dz_pairs + row / 2 * t.cols + j, dz0, dz1, n);
  Simd::store(t.dz_rows + row * t.cols + j, dz0, n);
  if (row + 1 < t.rows) Simd::store(t.dz_rows + (row + 1) * t.cols + j, dz1, n);
}

template <Mode MODE, Kind KIND, bool KEPT>
void backward_tile(const Backward& t) {
  for (int64_t row = 0; row < t.rows; row += KIND == BF16 ? 2 : 1) {
    int64_t j = 0;
    if constexpr (KIND == BF16) {
      for (; j + W <= t.cols; j += W) backward_pair<MODE, KIND, KEPT>(t, row, j, W);
      if (j < t.cols) backward_pair<MODE, KIND, KEPT>(t, row, j, int(t.cols - j));
    } else {
      for (; j + W <= t.cols; j += W) backward_store<MODE, KIND, KEPT>(t, row, j, W);
      if (j < t.cols) backward_store<MODE, KIND, KEPT>(t, row, j, int(t.cols - j));
    }
  }
}

template <Mode MODE, Kind KIND>
void backward_from(const Backward& t) {
  if (t.z) backward_tile<MODE, KIND, false>(t);
  else backward_tile<MODE, KIND, true>(t);
}

template <Mode MODE>
void forward_kind(const Forward& t, Kind kind) {
  if (kind == F32) forward_tile<MODE, F32>(t);
  else if (kind == ROUNDED) forward_tile<MODE, ROUNDED>(t);
  else forward_tile<MODE, BF16>(t);
}

template <Mode MODE>
void backward_kind(const Backward& t, Kind kind) {
  if (kind == F32) backward_from<MODE, F32>(t);
  else if (kind == ROUNDED) backward_from<MODE, ROUNDED>(t);
  else backward_from<MODE, BF16>(t);
}

void forward_any(const Forward& t, Mode mode, Kind kind) {
  switch (mode) {
    case DENSE: return forward_kind<DENSE>(t, kind);
    case MAGNITUDE_MASKED: return forward_kind<MAGNITUDE_MASKED>(t, kind);
    case MAGNITUDE_STE: return forward_kind<MAGNITUDE_STE>(t, kind);
    case SOFT_MASKED: return forward_kind<SOFT_MASKED>(t, kind);
    case SOFT_STE: return forward_kind<SOFT_STE>(t, kind);
  }
}

void backward_any(const Backward& t, Mode mode, Kind kind) {
  switch (mode) {
    case DENSE: return backward_kind<DENSE>(t, kind);
    case MAGNITUDE_MASKED: return backward_kind<MAGNITUDE_MASKED>(t, kind);
    case MAGNITUDE_STE: return backward_kind<MAGNITUDE_STE>(t, kind);
    case SOFT_MASKED: return backward_kind<SOFT_MASKED>(t, kind);
    case SOFT_STE: return backward_kind<SOFT_STE>(t, kind);
  }
}
