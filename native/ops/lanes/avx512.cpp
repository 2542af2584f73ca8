#if defined(__AVX512VNNI__)
#include <cstring>

#include "core/functions.h"
#include "ops/avx512.h"
#include "ops/lanes/v16_avx512.h"

namespace pw::avx512 {

#include "ops/lanes/lanes.inl"

void table(const TableArgs& a) {
  const Lut lut(a.lut);
  int64_t i = 0;
  for (; i + 64 <= a.n; i += 64) _mm512_storeu_si512(a.y + i, lut(_mm512_loadu_si512(a.x + i)));
  if (i < a.n) {
    const __mmask64 mask = (__mmask64(1) << (a.n - i)) - 1;
    _mm512_mask_storeu_epi8(a.y + i, mask, lut(_mm512_maskz_loadu_epi8(mask, a.x + i)));
  }
}

void table_f32(const TableF32Args& a) {
  int64_t i = 0;
  for (; i + 16 <= a.n; i += 16) {
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a.x + i)));
    _mm512_storeu_ps(a.y + i, _mm512_i32gather_ps(at, a.lut, 4));
  }
  for (; i < a.n; ++i) a.y[i] = a.lut[a.x[i]];
}

void max_pool_u8(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 64) {
    const __mmask64 mask = a.n - c >= 64 ? ~__mmask64(0) : (__mmask64(1) << (a.n - c)) - 1;
    __m512i best = _mm512_setzero_si512();
    for (int i = 0; i < a.count; ++i)
      best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(a.x[i]) + c));
    _mm512_mask_storeu_epi8(static_cast<uint8_t*>(a.y) + c, mask, best);
  }
}

void max_pool_f32(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 16) {
    V best = set1(-INFINITY);
    for (int i = 0; i < a.count; ++i) best = maximum(load(static_cast<const float*>(a.x[i]) + c, a.n - c, -INFINITY), best);
    store(static_cast<float*>(a.y) + c, a.n - c, best);
  }
}

void sum_pool(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 16) {
    const __mmask16 mask = head(a.n - c);
    __m512i sum = _mm512_set1_epi32(-a.zero * a.count);
    for (int i = 0; i < a.count; ++i)
      sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(a.x[i]) + c)));
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(a.y) + c, mask, sum);
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
