// Sixteen floats, and sixteen integers, in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pw {
namespace {

struct V {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

#define PW_EACH(type, fn, x, y) type{fn(x.a, y.a), fn(x.b, y.b)}
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load(const float* p, int n, float fill) {
  if (n >= 16) return load(p);
  alignas(32) float x[16];
  for (float& v : x) v = fill;
  std::memcpy(x, p, 4 * n);
  return load(x);
}
inline void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(float* p, int n, V x) {
  if (n >= 16) return store(p, x);
  alignas(32) float v[16];
  store(v, x);
  std::memcpy(p, v, 4 * n);
}
inline V operator+(V x, V y) { return PW_EACH(V, _mm256_add_ps, x, y); }
inline V operator-(V x, V y) { return PW_EACH(V, _mm256_sub_ps, x, y); }
inline V operator*(V x, V y) { return PW_EACH(V, _mm256_mul_ps, x, y); }
inline V operator/(V x, V y) { return PW_EACH(V, _mm256_div_ps, x, y); }
inline V maximum(V x, V y) { return PW_EACH(V, _mm256_max_ps, x, y); }
inline V minimum(V x, V y) { return PW_EACH(V, _mm256_min_ps, x, y); }
inline V rint(V x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline V absolute(V x) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
inline V negate(V x) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.a, bit), _mm256_xor_ps(x.b, bit)};
}
// Every lane that of the lane `h` away in its group of 2 h; and the upper halves of these groups negated. h: 1, 2, 4, 8.
inline V partners(V x, int h) {
  if (h == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
  if (h == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
  if (h == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  return {x.b, x.a};
}
inline V upper_negated(V x, int h) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bit = _mm256_set1_epi32(h);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(lane, bit), bit);
  const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(chosen), _mm256_set1_ps(-0.0f)), all = _mm256_set1_ps(-0.0f);
  if (h == 8) return {x.a, _mm256_xor_ps(x.b, all)};
  return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
}
inline V copysign(V m, V s) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, m.a), _mm256_and_ps(bit, s.a)),
          _mm256_or_ps(_mm256_andnot_ps(bit, m.b), _mm256_and_ps(bit, s.b))};
}
inline V where_less(V a, V b, V x, V y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
inline V square_root(V x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }

inline I integers(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // to nearest even
inline V reals(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I load_i32(const int32_t* p, int n) {
  alignas(32) int32_t x[16] = {};
  std::memcpy(x, p, 4 * (n < 16 ? n : 16));
  return {_mm256_load_si256(reinterpret_cast<__m256i*>(x)), _mm256_load_si256(reinterpret_cast<__m256i*>(x + 8))};
}
inline I load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I load_u8(const uint8_t* p, int n) {
  if (n >= 16) return load_u8(p);
  uint8_t x[16] = {};
  std::memcpy(x, p, n);
  return load_u8(x);
}
inline I load_i8(const int8_t* p, int n) {
  int8_t x[16] = {};
  std::memcpy(x, p, n < 16 ? n : 16);
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + 8)))};
}
inline void store_u8(uint8_t* p, I x) {  // values 0 .. 255
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_u8(uint8_t* p, int n, I x) {
  if (n >= 16) return store_u8(p, x);
  uint8_t v[16];
  store_u8(v, x);
  std::memcpy(p, v, n);
}
inline I operator+(I x, I y) { return PW_EACH(I, _mm256_add_epi32, x, y); }
inline I operator-(I x, I y) { return PW_EACH(I, _mm256_sub_epi32, x, y); }
inline I operator*(I x, I y) { return PW_EACH(I, _mm256_mullo_epi32, x, y); }
// 2^n of n + kMagic, which holds n in its low bits.
inline V power_of_magic(V x) {
  const __m256i one = _mm256_set1_epi32(127 << 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(x.a), 23), one)),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(x.b), 23), one))};
}
// Sum of the lanes, halves added: 8, 4, 2, 1.
inline float total(V x) {
  const __m256 by8 = _mm256_add_ps(x.a, x.b);
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
inline float greatest(V x) {
  const __m256 by8 = _mm256_max_ps(x.a, x.b);
  const __m128 by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)));
}

// One fused step: only for float products, whose sums have no order to keep.
inline V fused(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline I load_i8(const int8_t* p) { return load_i8(p, 16); }
inline I load_lanes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline I operator>>(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
struct Table16 {
  __m256 low, high;
};
inline Table16 table16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 entry(const Table16& t, __m256i i) {
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 chooses
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i), high);
}
// Of places in the low four bits; what is above them does not count.
inline V entry(const Table16& t, I i) { return {entry(t, i.a), entry(t, i.b)}; }
inline V entry(const float* table, I i) { return {_mm256_i32gather_ps(table, i.a, 4), _mm256_i32gather_ps(table, i.b, 4)}; }
// Thirty-two numbers of 16 bits.
struct W {
  __m256i a, b;
};
struct Shift16 {
  __m128i by;
};
inline Shift16 shift16(int n) { return {_mm_cvtsi32_si128(n)}; }
inline W words(int x) { return {_mm256_set1_epi16(int16_t(x)), _mm256_set1_epi16(int16_t(x))}; }
inline W load_words(const uint8_t* p) {
  return {_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
inline W shifted(W x, Shift16 s) { return {_mm256_sll_epi16(x.a, s.by), _mm256_sll_epi16(x.b, s.by)}; }
// Bits of x under the mask, bit 15 of y.
inline W mixed(W x, W y, W mask) {
  const __m256i sign = _mm256_set1_epi16(int16_t(0x8000));
  return {_mm256_or_si256(_mm256_and_si256(y.a, sign), _mm256_and_si256(x.a, mask.a)),
          _mm256_or_si256(_mm256_and_si256(y.b, sign), _mm256_and_si256(x.b, mask.b))};
}
inline V half_to_real(__m256i h) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
inline void small_floats(W x, V& a, V& b) {
  a = half_to_real(x.a);
  b = half_to_real(x.b);
}
inline V brain_to_real(__m256i h) {
  const auto wide = [](__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); };
  return {wide(_mm256_castsi256_si128(h)), wide(_mm256_extracti128_si256(h, 1))};
}
#undef PW_EACH

}  // namespace
}  // namespace pw
