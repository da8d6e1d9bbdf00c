// Eight floats without intrinsics: what every machine can do, and what the vector forms are tested against.
//
// The operations of every `simd_*.h`: W lanes, two or more groups of four; F floats, I integers, M a mask that takes
// & | ^ ~. `n` is how many lanes exist in memory; loads give 0 in the others, stores leave them alone.

struct Simd {
  static constexpr int W = 8;
  struct F {
    float v[W];
  };
  struct I {
    int32_t v[W];
  };
  using M = uint32_t;

#define EACH for (int i = 0; i < W; ++i)
  static F set(float x) { F a; EACH a.v[i] = x; return a; }
  static F load(const float* p, int n) { F a; EACH a.v[i] = i < n ? p[i] : 0; return a; }
  static F load(const uint16_t* p, int n) { F a; EACH a.v[i] = as_float(i < n ? uint32_t(p[i]) << 16 : 0); return a; }
  static void store(float* p, F a, int n) { for (int i = 0; i < n; ++i) p[i] = a.v[i]; }
  static void store(uint16_t* p, F a, int n) { for (int i = 0; i < n; ++i) p[i] = as_int(a.v[i]) >> 16; }
  static void store_pairs(uint32_t* p, F low, F high, int n) {
    for (int i = 0; i < n; ++i) p[i] = (uint32_t(as_int(low.v[i])) >> 16) | (as_int(high.v[i]) & 0xffff0000u);
  }
  static F add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
  static F sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
  static F mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
  static F div(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
  static F sqrt(F a) { EACH a.v[i] = std::sqrt(a.v[i]); return a; }
  // max(z, 0) that keeps NaN, with a positive sign, and has no -0.
  static F relu(F a) { EACH a.v[i] = a.v[i] <= 0 ? 0 : std::fabs(a.v[i]); return a; }
  // To the nearest bf16, ties to even.
  static F round(F a) {
    EACH {
      uint32_t x = as_int(a.v[i]);
      a.v[i] = as_float(a.v[i] != a.v[i] ? (x | 0x400000u) & 0xffff0000u : (x + 0x7fffu + (x >> 16 & 1)) & 0xffff0000u);
    }
    return a;
  }
  // An integer that orders relu's results; NaN ranks as infinity.
  static I key(F a) { I k; EACH k.v[i] = std::min(as_int(a.v[i]), 0x7f800000); return k; }
  // Whether a lane comes before the one K further on (around its group), ties to the lower index.
  template <int K>
  static M beats(I k) {
    M m = 0;
    EACH {
      int j = (i & ~3) | ((i + K) & 3);
      m |= M(i < j ? k.v[i] >= k.v[j] : k.v[i] > k.v[j]) << i;
    }
    return m;
  }
  static M nonzero(F a) { M m = 0; EACH m |= M(a.v[i] != 0) << i; return m; }
  static F maskz(M m, F a) { EACH a.v[i] = m >> i & 1 ? a.v[i] : 0; return a; }
  static F select(M m, F a, F b) { EACH a.v[i] = m >> i & 1 ? a.v[i] : b.v[i]; return a; }
  // The sum of its group in every lane.
  static F group_sum(F a) {
    F b;
    EACH { int g = i & ~3; b.v[i] = (a.v[g] + a.v[g + 2]) + (a.v[g + 1] + a.v[g + 3]); }
    return b;
  }
  static uint32_t bits(M m) { return m; }
  static M from_bits(uint32_t b) { return b; }
  // The lanes of `b`, two of every group, to p[0 .. n/2); and back, 0 elsewhere.
  template <class T>
  static void compress(T* p, F a, uint32_t b, int n) {
    F c = set(0);
    for (int i = 0, k = 0; i < W; ++i)
      if (b >> i & 1) c.v[k++] = a.v[i];
    store(p, c, n / 2);
  }
  template <class T>
  static F expand(const T* p, uint32_t b, int n) {
    F c = load(p, n / 2), a = set(0);
    for (int i = 0, k = 0; i < W; ++i)
      if (b >> i & 1) a.v[i] = c.v[k++];
    return a;
  }
#undef EACH
};
