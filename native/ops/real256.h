// The end of a float product, and bf16 numbers, eight at a time. For units compiled with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw {
namespace {

inline __m256 widened(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }

// To nearest, ties to even; a NaN stays one, and quiet.
inline __m128i rounded_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i y = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  y = _mm256_blendv_epi8(y, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), _mm256_castps_si256(nan));
  return _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

inline __m256 load_real(const void* p, int64_t at, bool bf16, int count) {
  if (bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(p) + at;
    if (count >= 8) return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    alignas(16) uint16_t part[8] = {};
    std::memcpy(part, from, 2 * size_t(count));
    return widened(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
  }
  const float* from = static_cast<const float*>(p) + at;
  if (count >= 8) return _mm256_loadu_ps(from);
  alignas(32) float part[8] = {};
  std::memcpy(part, from, 4 * size_t(count));
  return _mm256_load_ps(part);
}

inline void store_values(void* p, int64_t at, bool bf16, int count, __m256 y) {
  if (bf16) {
    uint16_t* to = static_cast<uint16_t*>(p) + at;
    const __m128i h = rounded_bf16(y);
    if (count >= 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), h);
    else {
      alignas(16) uint16_t part[8];
      _mm_store_si128(reinterpret_cast<__m128i*>(part), h);
      std::memcpy(to, part, 2 * size_t(count));
    }
    return;
  }
  float* to = static_cast<float*>(p) + at;
  if (count >= 8) {
    _mm256_storeu_ps(to, y);
  } else {
    alignas(32) float part[8];
    _mm256_store_ps(part, y);
    std::memcpy(to, part, 4 * size_t(count));
  }
}

// Eight sums of row m, from column n on; `left` of them count.
inline void store_real(const RealTail& t, __m256 y, int m, int n, int left, void* c, int64_t at) {
  if (left <= 0) return;
  if (t.bias) y = _mm256_add_ps(y, _mm256_loadu_ps(t.bias + n));
  if (t.addend) y = _mm256_add_ps(y, load_real(t.addend, t.r_offset[m] + n, t.addend_bf16, left));
  if (t.clip) y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(t.lo)), _mm256_set1_ps(t.hi));
  store_values(c, at, t.out_bf16, left, y);
}

}  // namespace
}  // namespace pw
