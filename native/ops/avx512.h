// Pieces shared by the AVX-512 kernels: what is done to a row of accumulators. For translation units compiled with
// AVX-512 alone; everything is internal to the unit that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
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

// Four bytes in every lane.
PW_INLINE __m512i broadcast4(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Bytes of a and b, side by side, by the lower 7 bits of an index. As assembly: only kAvx512Vbmi has it.
PW_INLINE __m512i permute_bytes(__m512i a, __m512i index, __m512i b) {
  __asm__("vpermi2b %2, %1, %0" : "+v"(index) : "v"(a), "v"(b));
  return index;
}

struct Lut {  // 256 bytes in four registers
  __m512i t[4];
  bool bytes;  // whether the processor permutes bytes: kAvx512Vbmi
  Lut(const uint8_t* p, bool bytes) : bytes(bytes) {
    for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(p + 64 * i);
  }
  PW_INLINE __m512i operator()(__m512i x) const {
    if (bytes) {
      const __m512i low = permute_bytes(t[0], x, t[1]), high = permute_bytes(t[2], x, t[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
    }
    const __m512i even = by_words(_mm512_and_si512(x, _mm512_set1_epi16(255))), odd = by_words(_mm512_srli_epi16(x, 8));
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, even, _mm512_slli_epi16(odd, 8));
  }

 private:
  // An index in every lane of 16 bits: two entries are picked as a word by its upper 7 bits, its lowest says which.
  PW_INLINE __m512i by_words(__m512i x) const {
    const __m512i word = _mm512_srli_epi16(x, 1);
    const __m512i low = _mm512_permutex2var_epi16(t[0], word, t[1]), high = _mm512_permutex2var_epi16(t[2], word, t[3]);
    const __m512i both = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(x, _mm512_set1_epi16(128)), low, high);
    return _mm512_srlv_epi16(both, _mm512_and_si512(_mm512_slli_epi16(x, 3), _mm512_set1_epi16(8)));
  }
};

PW_INLINE __mmask16 head16(int n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }
PW_INLINE __mmask64 head64(int n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// The kernel `table`; bytes: see Lut.
inline void look_up(const TableArgs& a, bool bytes) {
  const Lut lut(a.lut, bytes);
  int64_t i = 0;
  for (; i + 64 <= a.n; i += 64) _mm512_storeu_si512(a.y + i, lut(_mm512_loadu_si512(a.x + i)));
  if (i < a.n) {
    const __mmask64 mask = head64(int(a.n - i));
    _mm512_mask_storeu_epi8(a.y + i, mask, lut(_mm512_maskz_loadu_epi8(mask, a.x + i)));
  }
}

// 16 of 64 bytes. The position need not be known to the compiler: without optimisation it is not.
PW_INLINE __m128i quarter(__m512i x, int i) {
  switch (i) {
    case 0: return _mm512_castsi512_si128(x);
    case 1: return _mm512_extracti32x4_epi32(x, 1);
    case 2: return _mm512_extracti32x4_epi32(x, 2);
    default: return _mm512_extracti32x4_epi32(x, 3);
  }
}

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
  // The same where the zero point is 0 and all codes are allowed: saturation does it all.
  PW_INLINE __m512i whole_bytes(__m512i a, __m512i b, __m512i c, __m512i d) const {
    return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  }
};

// What store_row has to look at, decided once per product.
enum Path { kGeneral, kPlain, kWhole, kResidual, kTable };

inline Path path_of(const Epilogue& e) {
  if (e.out != Out::kU8 || e.row_zero || !e.fits || (e.lut && e.residual)) return kGeneral;
  const bool whole = e.zero == 0 && e.lo == 0 && e.hi == 255;
  return e.lut ? kTable : e.residual ? kResidual : whole ? kWhole : kPlain;
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

// Accumulators of one vector of columns to codes before packing.
template <Path path>
PW_INLINE __m512i to_codes(const Finish& f, __m512i acc, const float* multiplier, const uint8_t* r, __mmask16 mask) {
  __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(multiplier));
  if (path == kResidual || (path == kGeneral && r)) {
    const __m128i codes = mask == 0xffff ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(r)) : _mm_maskz_loadu_epi8(mask, r);
    t = _mm512_add_ps(t, f.residual(_mm512_cvtepu8_epi32(codes)));
  }
  return path == kGeneral ? f.rounded(t) : _mm512_cvtps_epi32(t);
}

// Four vectors of codes to 64 bytes, side by side.
template <Path path>
PW_INLINE __m512i to_bytes(const Finish& f, const __m512i* q) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i bytes = path == kWhole ? f.whole_bytes(q[0], q[1], q[2], q[3]) : f.bytes(q[0], q[1], q[2], q[3]);
  bytes = _mm512_permutexvar_epi32(order, bytes);
  if (path == kTable || (path == kGeneral && f.e.lut)) bytes = Lut(f.e.lut, f.e.permutes)(bytes);
  return bytes;
}

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
    __m512i q[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int j = 0; j < NB; ++j)
      q[j] = to_codes<path>(f, acc[j], e.multiplier + column + 16 * j, r ? r + 16 * j : nullptr, columns.part[j]);
    _mm512_mask_storeu_epi8(static_cast<uint8_t*>(c) + at, columns.bytes, to_bytes<path>(f, q));
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

// The same for codes alone, without masked stores: NB blocks of 16 columns, of the last one perhaps 8. Narrow rows share
// the packing: `rows` of them make 64 codes.
template <int NB, Path path>
struct Together {
  static constexpr int rows = NB == 1 ? 4 : NB == 2 ? 2 : 1;
  static PW_INLINE bool can(int columns) { return path != kGeneral && (columns >= 16 * NB || columns == 16 * NB - 8); }

  static PW_INLINE void last(uint8_t* y, __m128i codes, bool half) {
    if (__builtin_expect(half, 0)) _mm_storel_epi64(reinterpret_cast<__m128i*>(y), codes);
    else _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
  }

  // acc: [rows][NB], biases already in; c, residual: at the first column.
  static PW_INLINE void store(const Finish& f, const __m512i* acc, const __m512* multiplier, const int64_t* c_offset,
                              const uint8_t* residual, const int64_t* r_offset, uint8_t* c, bool half) {
    __m512i q[4];
    if (NB == 3) q[3] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i * NB + j]), multiplier[j]);
        if (path == kResidual) {
          const uint8_t* r = residual + r_offset[i] + 16 * j;
          const auto* r16 = reinterpret_cast<const __m128i*>(r);
          const __m128i codes = j == NB - 1 && __builtin_expect(half, 0) ? _mm_loadl_epi64(r16) : _mm_loadu_si128(r16);
          t = _mm512_add_ps(t, f.residual(_mm512_cvtepu8_epi32(codes)));
        }
        q[i * NB + j] = _mm512_cvtps_epi32(t);
      }
    const __m512i bytes = to_bytes<path>(f, q);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const int64_t at = c_offset[i];
      if (__builtin_expect(at < 0, 0)) continue;
      uint8_t* y = c + at;
      if (NB == 1) last(y, quarter(bytes, i), half);
      if (NB == 4 && __builtin_expect(!half, 1)) {
        _mm512_storeu_si512(y, bytes);
        continue;
      }
      if (NB >= 3) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(bytes));
      if (NB == 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 32), _mm512_extracti32x4_epi32(bytes, 2));
      if (NB >= 3) last(y + 16 * (NB - 1), _mm512_extracti32x4_epi32(bytes, NB == 3 ? 2 : 3), half);
      if (NB == 2) {
        const __m256i row = i ? _mm512_extracti64x4_epi64(bytes, 1) : _mm512_castsi512_si256(bytes);
        if (__builtin_expect(half, 0)) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_castsi256_si128(row));
          _mm_storel_epi64(reinterpret_cast<__m128i*>(y + 16), _mm256_extracti128_si256(row, 1));
        } else {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), row);
        }
      }
    }
  }
};

// Calls body with the path as a constant.
template <class F>
PW_INLINE void with_path(Path path, F body) {
  switch (path) {
    case kPlain: return body(std::integral_constant<Path, kPlain>());
    case kWhole: return body(std::integral_constant<Path, kWhole>());
    case kResidual: return body(std::integral_constant<Path, kResidual>());
    case kTable: return body(std::integral_constant<Path, kTable>());
    default: return body(std::integral_constant<Path, kGeneral>());
  }
}

}  // namespace
}  // namespace pw
