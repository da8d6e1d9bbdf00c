// Eight floats in AVX2; the operations are those of simd_scalar.h.

struct Simd {
  static constexpr int W = 8;
  using F = __m256;
  using I = __m256i;
  using M = __m256i;

  static F set(float x) { return _mm256_set1_ps(x); }
  static I first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static F load(const float* p, int n) { return n == W ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n)); }
  static F load(const uint16_t* p, int n) {
    uint16_t part[W] = {};
    if (n < W) {
      for (int i = 0; i < n; ++i) part[i] = p[i];
      p = part;
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static void store(float* p, F a, int n) {
    if (n == W) _mm256_storeu_ps(p, a);
    else _mm256_maskstore_ps(p, first(n), a);
  }
  static void store(uint16_t* p, F a, int n) {
    I x = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    __m128i y = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    if (n == W) return _mm_storeu_si128((__m128i*)p, y);
    uint16_t part[W];
    _mm_storeu_si128((__m128i*)part, y);
    for (int i = 0; i < n; ++i) p[i] = part[i];
  }
  static void store_pairs(uint32_t* p, F low, F high, int n) {
    I x = _mm256_srli_epi32(_mm256_castps_si256(low), 16);
    I y = _mm256_and_si256(_mm256_castps_si256(high), _mm256_set1_epi32(0xffff0000));
    store((float*)p, _mm256_castsi256_ps(_mm256_or_si256(x, y)), n);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F relu(F a) {  // the maximum gives its second operand where one is NaN
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_max_ps(_mm256_setzero_ps(), a));
  }
  static F round(F a) {
    I x = _mm256_castps_si256(a), high = _mm256_set1_epi32(0xffff0000);
    I odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    I y = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    I quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_blendv_epi8(y, quiet, nan), high));
  }
  static I key(F a) { return _mm256_min_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f800000)); }
  template <int K>
  static M beats(I k) {  // a >= b is a > b - 1: one where the other lane has the higher index
    constexpr int turn = K == 1 ? 0x39 : K == 2 ? 0x4e : 0x93;
    I one = _mm256_setr_epi32(1, K < 3, K < 2, 0, 1, K < 3, K < 2, 0);
    return _mm256_cmpgt_epi32(k, _mm256_sub_epi32(_mm256_shuffle_epi32(k, turn), one));
  }
  static M nonzero(F a) { return _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ)); }
  static F maskz(M m, F a) { return _mm256_and_ps(_mm256_castsi256_ps(m), a); }
  static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
  static F group_sum(F a) {
    a = _mm256_add_ps(a, _mm256_permute_ps(a, 0x4e));
    return _mm256_add_ps(a, _mm256_permute_ps(a, 0x39));
  }
  static uint32_t bits(M m) { return _mm256_movemask_ps(_mm256_castsi256_ps(m)); }
  static M from_bits(uint32_t b) {
    I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(b), bit), bit);
  }
  template <class T>
  static void compress(T* p, F a, uint32_t b, int n) {
    alignas(32) float all[W], some[W] = {};
    _mm256_store_ps(all, a);
    for (int k = 0; b; b &= b - 1) some[k++] = all[__builtin_ctz(b)];
    store(p, _mm256_load_ps(some), n / 2);
  }
  template <class T>
  static F expand(const T* p, uint32_t b, int n) {
    alignas(32) float all[W] = {}, some[W];
    _mm256_store_ps(some, load(p, n / 2));
    for (int k = 0; b; b &= b - 1) all[__builtin_ctz(b)] = some[k++];
    return _mm256_load_ps(all);
  }
};
