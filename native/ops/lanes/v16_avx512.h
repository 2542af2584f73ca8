// Sixteen floats, and sixteen integers, in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pw {
namespace {

struct V {
  __m512 v;
};
struct I {
  __m512i v;
};

inline __mmask16 head(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const float* p, int n, float fill) {
  if (n >= 16) return load(p);  // masks cost, also those of all lanes
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), head(n), p)};
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, int n, V x) {
  if (n >= 16) store(p, x);
  else _mm512_mask_storeu_ps(p, head(n), x.v);
}
inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V maximum(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V minimum(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V rint(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V absolute(V a) { return {_mm512_abs_ps(a.v)}; }
inline V negate(V a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
// Every lane that of the lane `h` away in its group of 2 h; and the upper halves of these groups negated. h: 1, 2, 4, 8.
inline V partners(V a, int h) {
  if (h == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if (h == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  return {h == 4 ? _mm512_shuffle_f32x4(a.v, a.v, 0xb1) : _mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
inline V upper_negated(V a, int h) {
  const __mmask16 upper = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
  return {_mm512_mask_xor_ps(a.v, upper, a.v, _mm512_set1_ps(-0.0f))};
}
inline V copysign(V magnitude, V sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
// x where a < b, else y
inline V where_less(V a, V b, V x, V y) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)}; }
inline V square_root(V a) { return {_mm512_sqrt_ps(a.v)}; }

inline I integers(V a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
inline V reals(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I load_i32(const int32_t* p, int n) {
  return {n >= 16 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(head(n), p)};
}
inline I load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline I load_u8(const uint8_t* p, int n) {
  if (n >= 16) return load_u8(p);
  return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(head(n), p))};
}
inline I load_i8(const int8_t* p, int n) { return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(head(n), p))}; }
inline void store_u8(uint8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }
inline void store_u8(uint8_t* p, int n, I x) {
  if (n >= 16) store_u8(p, x);
  else _mm_mask_storeu_epi8(p, head(n), _mm512_cvtepi32_epi8(x.v));
}
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// 2^n of n + kMagic, which holds n in its low bits.
inline V power_of_magic(V x) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(x.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)))};
}

// Sum of the lanes, halves added: 8, 4, 2, 1.
inline float total(V x) {
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
inline float greatest(V x) { return _mm512_reduce_max_ps(x.v); }

// One fused step: only for float products, whose sums have no order to keep.
inline V fused(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline I load_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline I load_lanes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline I operator>>(I x, int n) { return {_mm512_srli_epi32(x.v, unsigned(n))}; }
struct Table16 {
  __m512 v;
};
inline Table16 table16(const float* p) { return {_mm512_loadu_ps(p)}; }
// Of places in the low four bits; what is above them does not count.
inline V entry(const Table16& t, I i) { return {_mm512_permutexvar_ps(i.v, t.v)}; }
inline V entry(const float* table, I i) { return {_mm512_i32gather_ps(i.v, table, 4)}; }
// Thirty-two numbers of 16 bits.
struct W {
  __m512i v;
};
struct Shift16 {
  __m512i by;
};
inline Shift16 shift16(int n) { return {_mm512_set1_epi16(int16_t(n))}; }
inline W words(int x) { return {_mm512_set1_epi16(int16_t(x))}; }
inline W load_words(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline W shifted(W x, Shift16 s) { return {_mm512_sllv_epi16(x.v, s.by)}; }
// Bits of x under the mask, bit 15 of y.
inline W mixed(W x, W y, W mask) {
  const __m512i sign = _mm512_and_si512(y.v, _mm512_set1_epi16(int16_t(0x8000)));
  return {_mm512_ternarylogic_epi64(sign, x.v, mask.v, 0xf8)};
}
inline V half_to_real(__m256i h) { return {_mm512_cvtph_ps(h)}; }
inline void small_floats(W x, V& a, V& b) {
  a = half_to_real(_mm512_castsi512_si256(x.v));
  b = half_to_real(_mm512_extracti64x4_epi64(x.v, 1));
}
inline V brain_to_real(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }

}  // namespace
}  // namespace pw
