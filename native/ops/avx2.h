// Pieces shared by the AVX2 kernels: loads, and the epilogue of eight accumulators. Internal to the unit that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/kernels.h"

namespace pw {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Four bytes in every lane.
inline __m256i broadcast4(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// Codes of eight accumulators, biases in, at `place` of the epilogue's arrays; r: codes of the residual, widened, or null.
inline __m256i codes8(const Epilogue& e, __m256i acc, int place, const __m256i* r) {
  __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(e.multiplier + place));
  if (r) {
    const __m256 u = _mm256_cvtepi32_ps(_mm256_sub_epi32(*r, _mm256_set1_epi32(e.r_zero)));
    t = _mm256_add_ps(t, _mm256_mul_ps(u, _mm256_set1_ps(e.r_multiplier)));
  }
  t = _mm256_max_ps(t, _mm256_set1_ps(float(e.lo - e.zero)));
  t = _mm256_min_ps(t, _mm256_set1_ps(float(e.hi - e.zero)));
  return _mm256_add_epi32(_mm256_cvtps_epi32(t), _mm256_set1_epi32(e.zero));
}

inline __m256i biased(const Epilogue& e, __m256i acc, int place) {
  return _mm256_add_epi32(acc, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.bias + place)));
}

inline __m256i widened8(const uint8_t* codes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}

// Eight accumulators of one row, from `column` on; `columns` of them count.
inline void store8(const Epilogue& e, __m256i raw, int column, int columns, int row, const uint8_t* r,
                   const float* addend, void* c, int64_t at) {
  const int count = columns < 8 ? columns : 8;
  __m256i acc = biased(e, raw, column);
  if (e.row_zero) {
    const __m256i z = _mm256_set1_epi32(e.row_zero[int64_t(row) * e.row_step]);
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.colsum + column));
    acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(z, sums));
  }
  alignas(32) int32_t out[8];
  if (e.out == Out::kI32) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), acc);
    std::memcpy(static_cast<int32_t*>(c) + at, out, 4 * count);
    return;
  }
  if (e.out == Out::kU8) {
    uint8_t codes[8] = {};
    if (r) std::memcpy(codes, r, size_t(count));
    const __m256i wide = widened8(codes);
    const __m256i q = codes8(e, acc, column, r ? &wide : nullptr);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(words, words));
    if (e.lut)
      for (uint8_t& code : codes) code = e.lut[code];
    uint8_t* y = static_cast<uint8_t*>(c) + at;
    if (count == 8) std::memcpy(y, codes, 8);
    else std::memcpy(y, codes, size_t(count));
    return;
  }
  __m256 t = _mm256_cvtepi32_ps(acc);
  if (e.row_scale) t = _mm256_mul_ps(t, _mm256_set1_ps(e.row_scale[int64_t(row) * e.row_step]));
  t = _mm256_mul_ps(t, _mm256_loadu_ps(e.multiplier + column));
  if (e.bias_f32) t = _mm256_add_ps(t, _mm256_loadu_ps(e.bias_f32 + column));
  if (count == 8) {
    if (addend) t = _mm256_add_ps(t, _mm256_loadu_ps(addend));
    _mm256_storeu_ps(static_cast<float*>(c) + at, t);
    return;
  }
  alignas(32) float values[8] = {};
  if (addend) {
    std::memcpy(values, addend, 4 * count);
    t = _mm256_add_ps(t, _mm256_load_ps(values));
  }
  _mm256_store_ps(values, t);
  std::memcpy(static_cast<float*>(c) + at, values, 4 * count);
}

// The same of sixteen accumulators, in two registers. Where they all become codes, these are stored at once.
inline void store16(const Epilogue& e, __m256i low, __m256i high, int column, int columns, int row, const uint8_t* r,
                    const float* addend, void* c, int64_t at) {
  if (columns < 16 || e.out != Out::kU8 || e.row_zero) {
    store8(e, low, column, columns, row, r, addend, c, at);
    if (columns > 8)
      store8(e, high, column + 8, columns - 8, row, r ? r + 8 : nullptr, addend ? addend + 8 : nullptr, c, at + 8);
    return;
  }
  __m256i q[2] = {low, high};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i wide = r ? widened8(r + 8 * i) : _mm256_setzero_si256();
    q[i] = codes8(e, biased(e, q[i], column + 8 * i), column + 8 * i, r ? &wide : nullptr);
  }
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
  const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  uint8_t* y = static_cast<uint8_t*>(c) + at;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
  if (e.lut)
    for (int i = 0; i < 16; ++i) y[i] = e.lut[y[i]];
}

}  // namespace
}  // namespace pw
