// Pieces shared by the AVX-512 kernels: what is done to a row of accumulators. For translation units compiled with
// AVX-512 alone; everything is internal to the unit that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "core/kernels.h"

namespace pw {
namespace {

#define PW_INLINE inline __attribute__((always_inline))

// c += u8 a . s8 b, four products a lane. As assembly: gcc 12 spills accumulators around the intrinsic.
PW_INLINE void dot4(__m512i& c, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
PW_INLINE void dot4m(__m512i& c, __m512i a, const void* b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "m"(*static_cast<const __m512i*>(b)));
}

struct Lut {  // 256 bytes in four registers
  __m512i t[4];
  explicit Lut(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(p + 64 * i);
  }
  PW_INLINE __m512i operator()(__m512i x) const {
    const __m512i low = _mm512_permutex2var_epi8(t[0], x, t[1]);
    const __m512i high = _mm512_permutex2var_epi8(t[2], x, t[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
  }
};

PW_INLINE __mmask16 head16(int n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }
PW_INLINE __mmask64 head64(int n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// An epilogue with its numbers spread over registers once.
struct Finish {
  const Epilogue& e;
  __m512 low, high, r_multiplier;
  __m512i zero32, r_zero, zero16, low8, high8;
  explicit Finish(const Epilogue& e) : e(e) {
    low = _mm512_set1_ps(float(e.lo - e.zero));
    high = _mm512_set1_ps(float(e.hi - e.zero));
    r_multiplier = _mm512_set1_ps(e.r_multiplier);
    zero32 = _mm512_set1_epi32(e.zero);
    zero16 = _mm512_set1_epi16(int16_t(e.zero));
    r_zero = _mm512_set1_epi32(e.r_zero);
    low8 = _mm512_set1_epi8(char(e.lo));
    high8 = _mm512_set1_epi8(char(e.hi));
  }

  // Float to integer codes minus the zero point. Where no product can leave int32, saturating packs do the clamping.
  PW_INLINE __m512i rounded(__m512 t) const {
    if (!e.fits) t = _mm512_min_ps(_mm512_max_ps(t, low), high);
    return _mm512_cvtps_epi32(t);
  }
  PW_INLINE __m512 residual(__m512i codes) const {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, r_zero)), r_multiplier);
  }
  // Four vectors of rounded values to 64 bytes; lanes come out as packing leaves them.
  PW_INLINE __m512i bytes(__m512i a, __m512i b, __m512i c, __m512i d) const {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero16);
    const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero16);
    return _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(ab, cd), low8), high8);
  }
};

// What store_row has to look at, decided once per product.
enum Path { kGeneral, kPlain, kResidual, kTable };

inline Path path_of(const Epilogue& e) {
  if (e.out != Out::kU8 || e.row_zero || !e.fits || (e.lut && e.residual)) return kGeneral;
  return e.lut ? kTable : e.residual ? kResidual : kPlain;
}

// The columns of a block that count, as masks.
struct Columns {
  int first, count;  // count: up to 64
  __mmask64 bytes;
  __mmask16 part[4];
  Columns(int first, int left, int blocks) : first(first), count(left < 16 * blocks ? left : 16 * blocks) {
    bytes = head64(count);
    for (int j = 0; j < 4; ++j) part[j] = head16(count - 16 * j);
  }
};

// One row of up to 16 * NB accumulators, biases already in.
template <int NB, Path path>
PW_INLINE void store_row(const Finish& f, const __m512i* raw, const Columns& columns, int row, const uint8_t* r,
                         const float* addend, void* c, int64_t at) {
  const Epilogue& e = f.e;
  const int column = columns.first;
  __m512i acc[NB];
  for (int j = 0; j < NB; ++j) acc[j] = raw[j];
  if (path == kGeneral && e.row_zero) {
    const __m512i z = _mm512_set1_epi32(e.row_zero[int64_t(row) * e.row_step]);
    for (int j = 0; j < NB; ++j)
      acc[j] = _mm512_sub_epi32(acc[j], _mm512_mullo_epi32(z, _mm512_loadu_si512(e.colsum + column + 16 * j)));
  }
  if (path != kGeneral || e.out == Out::kU8) {
    __m512i q[4];
    for (int j = 0; j < 4; ++j) {
      if (j >= NB) {
        q[j] = _mm512_setzero_si512();
        continue;
      }
      __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[j]), _mm512_loadu_ps(e.multiplier + column + 16 * j));
      if (path == kResidual || (path == kGeneral && r)) {
        const __m128i codes = _mm_maskz_loadu_epi8(columns.part[j], r + 16 * j);
        t = _mm512_add_ps(t, f.residual(_mm512_cvtepu8_epi32(codes)));
      }
      q[j] = path == kGeneral ? f.rounded(t) : _mm512_cvtps_epi32(t);
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i bytes = _mm512_permutexvar_epi32(order, f.bytes(q[0], q[1], q[2], q[3]));
    if (path == kTable || (path == kGeneral && e.lut)) bytes = Lut(e.lut)(bytes);
    uint8_t* y = static_cast<uint8_t*>(c) + at;
    if (columns.count < 16 * NB) {
      _mm512_mask_storeu_epi8(y, columns.bytes, bytes);
    } else if (NB == 4) {  // masked stores are slow
      _mm512_storeu_si512(y, bytes);
    } else {
      if (NB == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_castsi512_si128(bytes));
      if (NB >= 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(bytes));
      if (NB == 3) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 32), _mm512_extracti32x4_epi32(bytes, 2));
    }
    return;
  }
  for (int j = 0; j < NB; ++j) {
    const __mmask16 mask = columns.part[j];
    if (e.out == Out::kI32) {
      _mm512_mask_storeu_epi32(static_cast<int32_t*>(c) + at + 16 * j, mask, acc[j]);
      continue;
    }
    __m512 t = _mm512_cvtepi32_ps(acc[j]);
    if (e.row_scale) t = _mm512_mul_ps(t, _mm512_set1_ps(e.row_scale[int64_t(row) * e.row_step]));
    t = _mm512_mul_ps(t, _mm512_loadu_ps(e.multiplier + column + 16 * j));
    if (e.bias_f32) t = _mm512_add_ps(t, _mm512_loadu_ps(e.bias_f32 + column + 16 * j));
    if (addend) t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(mask, addend + 16 * j));
    _mm512_mask_storeu_ps(static_cast<float*>(c) + at + 16 * j, mask, t);
  }
}

// Calls body with the path as a constant.
template <class F>
PW_INLINE void with_path(Path path, F body) {
  switch (path) {
    case kPlain: return body(std::integral_constant<Path, kPlain>());
    case kResidual: return body(std::integral_constant<Path, kResidual>());
    case kTable: return body(std::integral_constant<Path, kTable>());
    default: return body(std::integral_constant<Path, kGeneral>());
  }
}

}  // namespace
}  // namespace pw
