// Sixteen floats in AVX-512 (F, BW, VL, DQ); the operations are those of simd_scalar.h.

struct Simd {
  static constexpr int W = 16;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static M first(int n) { return M((1u << n) - 1); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p, int n) { return n == W ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p); }
  static F load(const uint16_t* p, int n) {
    __m256i x = n == W ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static void store(float* p, F a, int n) {
    if (n == W) _mm512_storeu_ps(p, a);
    else _mm512_mask_storeu_ps(p, first(n), a);
  }
  static void store(uint16_t* p, F a, int n) {
    __m256i x = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a), 16));
    if (n == W) _mm256_storeu_si256((__m256i*)p, x);
    else _mm256_mask_storeu_epi16(p, first(n), x);
  }
  static void store_pairs(uint32_t* p, F low, F high, int n) {
    I x = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    I y = _mm512_and_si512(_mm512_castps_si512(high), _mm512_set1_epi32(0xffff0000));
    store((float*)p, _mm512_castsi512_ps(_mm512_or_si512(x, y)), n);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F relu(F a) { return _mm512_abs_ps(_mm512_max_ps(_mm512_setzero_ps(), a)); }
  static F round(F a) {
    I x = _mm512_castps_si512(a);
    I odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    I y = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    y = _mm512_mask_or_epi32(y, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), x, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(y, _mm512_set1_epi32(0xffff0000)));
  }
  static I key(F a) { return _mm512_min_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x7f800000)); }
  template <int K>
  static M beats(I k) {
    constexpr _MM_PERM_ENUM turn = _MM_PERM_ENUM(K == 1 ? 0x39 : K == 2 ? 0x4e : 0x93);
    I one = _mm512_set4_epi32(0, K < 2, K < 3, 1);
    return _mm512_cmpgt_epi32_mask(k, _mm512_sub_epi32(_mm512_shuffle_epi32(k, turn), one));
  }
  static M nonzero(F a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
  static F maskz(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
  static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static F group_sum(F a) {
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    return _mm512_add_ps(a, _mm512_permute_ps(a, 0x39));
  }
  static uint32_t bits(M m) { return m; }
  static M from_bits(uint32_t b) { return M(b); }
  static void compress(float* p, F a, uint32_t b, int n) { 
    F c = _mm512_maskz_compress_ps(M(b), a);
    if (n == W) _mm256_storeu_ps(p, _mm512_castps512_ps256(c));
    else store(p, c, n / 2);
  }
  static void compress(uint16_t* p, F a, uint32_t b, int n) {
    F c = _mm512_maskz_compress_ps(M(b), a);
    __m256i x = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(c), 16));
    if (n == W) _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(x));
    else _mm256_mask_storeu_epi16(p, first(n / 2), x);
  }
  template <class T>
  static F expand(const T* p, uint32_t b, int n) { return _mm512_maskz_expand_ps(M(b), load(p, n / 2)); }
};
