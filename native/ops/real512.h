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

// The upper halves are x as bf16: to nearest, ties to even; a NaN stays one, and quiet. In integers: the conversion
// instruction would flush what is tiny.
PW_REAL_INLINE __m512i rounded_above(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i y = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_or_epi32(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}

PW_REAL_INLINE __m256i rounded_bf16(__m512 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_above(x), 16)); }

// Of x, then of y.
PW_REAL_INLINE __m512i rounded_bf16(__m512 x, __m512 y) {
  const __m512i ascending = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                             21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(rounded_above(x), ascending, rounded_above(y));
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

// The same for `rows` rows of NB vectors, in memory, all of whose columns count.
template <int NB, bool add, bool clip, bool half, class Args>
void store_whole(const Args& g, const __m512* acc, int rows, int m, int column) {
  const RealTail& t = g.tail;
  const __m512 lo = _mm512_set1_ps(t.lo), hi = _mm512_set1_ps(t.hi);
  __m512 bias[NB];
#pragma GCC unroll 4
  for (int j = 0; j < NB; ++j)  // x + -0 = x
    bias[j] = t.bias ? _mm512_loadu_ps(t.bias + column + 16 * j) : _mm512_set1_ps(-0.0f);
#pragma GCC unroll 1
  for (int i = m; i < m + rows; ++i, acc += NB) {
    const int64_t at = g.c_offset[i] + column, other = add ? t.r_offset[i] + column : 0;
    __m512 y[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      y[j] = _mm512_add_ps(acc[j], bias[j]);
      if (add) y[j] = _mm512_add_ps(y[j], load_real(t.addend, other + 16 * j, t.addend_bf16, 0xffff));
      if (clip) y[j] = _mm512_min_ps(_mm512_max_ps(y[j], lo), hi);
    }
    if constexpr (half && NB > 1) {
#pragma GCC unroll 2
      for (int j = 0; j < NB; j += 2)
        _mm512_storeu_si512(static_cast<uint16_t*>(g.c) + at + 16 * j, rounded_bf16(y[j], y[j + 1]));
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) store_values(g.c, at + 16 * j, half, 0xffff, y[j]);
    }
  }
}

// Not inlined: it would stand in every tile.
template <int NB, class Args>
__attribute__((noinline)) void store_tile(const Args& g, const __m512* acc, int rows, int m, int block) {
  const RealTail& t = g.tail;
  if (g.n - 16 * block >= 16 * NB) {
    using Store = void (*)(const Args&, const __m512*, int, int, int);
    static constexpr Store of[] = {
        store_whole<NB, false, false, false, Args>, store_whole<NB, false, false, true, Args>,
        store_whole<NB, false, true, false, Args>,  store_whole<NB, false, true, true, Args>,
        store_whole<NB, true, false, false, Args>,  store_whole<NB, true, false, true, Args>,
        store_whole<NB, true, true, false, Args>,   store_whole<NB, true, true, true, Args>};
    return of[4 * (t.addend != nullptr) + 2 * t.clip + t.out_bf16](g, acc, rows, m, 16 * block);
  }
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      const int column = 16 * (block + j);
      store_real(t, *acc++, m + i, column, g.n - column, g.c, g.c_offset[m + i] + column);
    }
}

}  // namespace
}  // namespace pw
