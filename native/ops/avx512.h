// Pieces shared by the AVX-512 kernels: the epilogue of one row of accumulators. For translation units compiled with
// AVX-512 alone; everything is internal to the unit that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"

namespace pw {
namespace {

// c += u8 a . s8 b, four products a lane. As assembly: gcc 12 spills accumulators around the intrinsic.
inline __attribute__((always_inline)) void dot4(__m512i& c, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
}
inline __attribute__((always_inline)) void dot4m(__m512i& c, __m512i a, const void* b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "m"(*static_cast<const __m512i*>(b)));
}

struct Lut {  // 256 bytes in four registers
  __m512i t[4];
  explicit Lut(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(p + 64 * i);
  }
  __m512i operator()(__m512i x) const {
    const __m512i low = _mm512_permutex2var_epi8(t[0], x, t[1]);
    const __m512i high = _mm512_permutex2var_epi8(t[2], x, t[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
  }
};

inline __mmask16 tail_mask(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// Codes (as int32, in range) of one vector of accumulators.
inline __attribute__((always_inline)) __m512i codes16(const Epilogue& e, __m512i acc, int column, const uint8_t* r,
                                                      __mmask16 mask) {
  __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(e.multiplier + column));
  if (r) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, r));
    const __m512 u = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(e.r_zero)));
    t = _mm512_add_ps(t, _mm512_mul_ps(u, _mm512_set1_ps(e.r_multiplier)));
  }
  t = _mm512_max_ps(t, _mm512_set1_ps(float(e.lo - e.zero)));
  t = _mm512_min_ps(t, _mm512_set1_ps(float(e.hi - e.zero)));
  return _mm512_add_epi32(_mm512_cvtps_epi32(t), _mm512_set1_epi32(e.zero));
}

inline __attribute__((always_inline)) __m512 real16(const Epilogue& e, __m512i acc, int column, int row,
                                                    const float* addend, __mmask16 mask) {
  __m512 t = _mm512_cvtepi32_ps(acc);
  if (e.row_scale) t = _mm512_mul_ps(t, _mm512_set1_ps(e.row_scale[int64_t(row) * e.row_step]));
  t = _mm512_mul_ps(t, _mm512_loadu_ps(e.multiplier + column));
  if (e.bias_f32) t = _mm512_add_ps(t, _mm512_loadu_ps(e.bias_f32 + column));
  if (addend) t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(mask, addend));
  return t;
}

// One row of up to 16 * NB columns of raw accumulators; `columns` of them count.
template <int NB>
inline __attribute__((always_inline)) void store_row(const Epilogue& e, const __m512i* raw, int column, int columns,
                                                     int row, const uint8_t* r, const float* addend, void* c,
                                                     int64_t at) {
  __m512i acc[NB];
  for (int j = 0; j < NB; ++j) acc[j] = _mm512_add_epi32(raw[j], _mm512_loadu_si512(e.bias + column + 16 * j));
  if (e.row_zero) {
    const __m512i z = _mm512_set1_epi32(e.row_zero[int64_t(row) * e.row_step]);
    for (int j = 0; j < NB; ++j)
      acc[j] = _mm512_sub_epi32(acc[j], _mm512_mullo_epi32(z, _mm512_loadu_si512(e.colsum + column + 16 * j)));
  }
  if (e.out == Out::kU8) {
    uint8_t* y = static_cast<uint8_t*>(c) + at;
    if (NB == 4 && columns >= 64) {
      __m512i q[4];
      for (int j = 0; j < 4; ++j)
        q[j] = codes16(e, acc[j < NB ? j : 0], column + 16 * j, r ? r + 16 * j : nullptr, 0xffff);
      const __m512i ab = _mm512_packus_epi32(q[0], q[1]), cd = _mm512_packus_epi32(q[2], q[3]);
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
      if (e.lut) bytes = Lut(e.lut)(bytes);
      _mm512_storeu_si512(y, bytes);
      return;
    }
    for (int j = 0; j < NB; ++j) {
      const int left = columns - 16 * j;
      if (left <= 0) break;
      const __mmask16 mask = tail_mask(left);
      __m128i q = _mm512_cvtepi32_epi8(codes16(e, acc[j], column + 16 * j, r ? r + 16 * j : nullptr, mask));
      if (e.lut) q = _mm512_castsi512_si128(Lut(e.lut)(_mm512_castsi128_si512(q)));
      _mm_mask_storeu_epi8(y + 16 * j, mask, q);
    }
    return;
  }
  for (int j = 0; j < NB; ++j) {
    const int left = columns - 16 * j;
    if (left <= 0) break;
    const __mmask16 mask = tail_mask(left);
    if (e.out == Out::kI32) {
      _mm512_mask_storeu_epi32(static_cast<int32_t*>(c) + at + 16 * j, mask, acc[j]);
    } else {
      const __m512 t = real16(e, acc[j], column + 16 * j, row, addend ? addend + 16 * j : nullptr, mask);
      _mm512_mask_storeu_ps(static_cast<float*>(c) + at + 16 * j, mask, t);
    }
  }
}

}  // namespace
}  // namespace pw
