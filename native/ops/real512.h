// The end of a float product, and bf16 numbers, sixteen at a time. For units compiled with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"

namespace pw {
namespace {

#define PW_REAL_INLINE inline __attribute__((always_inline))

PW_REAL_INLINE __mmask16 first16(int n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

PW_REAL_INLINE __m512 widened(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

// To nearest, ties to even; a NaN stays one, and quiet. In integers: the conversion instruction would flush what is tiny.
PW_REAL_INLINE __m256i rounded_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i y = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  y = _mm512_mask_or_epi32(y, nan, high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(y);
}

PW_REAL_INLINE __m512 load_real(const void* p, int64_t at, bool bf16, __mmask16 mask) {
  if (!bf16) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + at);
  return widened(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + at));
}

PW_REAL_INLINE void store_values(void* p, int64_t at, bool bf16, __mmask16 mask, __m512 y) {
  if (!bf16) {
    float* to = static_cast<float*>(p) + at;
    if (mask == 0xffff) _mm512_storeu_ps(to, y);
    else _mm512_mask_storeu_ps(to, mask, y);
  } else {
    uint16_t* to = static_cast<uint16_t*>(p) + at;
    const __m256i h = rounded_bf16(y);
    if (mask == 0xffff) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), h);
    else _mm256_mask_storeu_epi16(to, mask, h);
  }
}

// Sixteen sums of row m, from column n on; `left` of them count.
PW_REAL_INLINE void store_real(const RealTail& t, __m512 y, int m, int n, int left, void* c, int64_t at) {
  const __mmask16 mask = first16(left);
  if (t.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(t.bias + n));
  if (t.addend) y = _mm512_add_ps(y, load_real(t.addend, t.r_offset[m] + n, t.addend_bf16, mask));
  if (t.clip) y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(t.lo)), _mm512_set1_ps(t.hi));
  store_values(c, at, t.out_bf16, mask, y);
}

// The same for `rows` rows of NB vectors, in memory. Not inlined: it would stand in every tile.
template <int NB, class Args>
__attribute__((noinline)) void store_tile(const Args& g, const __m512* acc, int rows, int m, int block) {
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      const int column = 16 * (block + j);
      store_real(g.tail, *acc++, m + i, column, g.n - column, g.c, g.c_offset[m + i] + column);
    }
}

}  // namespace
}  // namespace pw
