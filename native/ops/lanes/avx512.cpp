#if defined(__AVX512VNNI__)
#include <cstring>

#include "core/functions.h"
#include "ops/avx512.h"
#include "ops/lanes/v16_avx512.h"

namespace pw::avx512 {

#include "ops/lanes/lanes.inl"

void quantize(const QuantizeArgs& a) {
  const __m512 r = _mm512_set1_ps(a.r), low = _mm512_set1_ps(float(a.lo - a.zero)), high = _mm512_set1_ps(float(a.hi - a.zero));
  const __m512i zero = _mm512_set1_epi16(int16_t(a.zero));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= a.n; i += 64) {  // the bounds are integers, so clamping may come first, and fits 16 bits
    __m512i q[4];
    for (int j = 0; j < 4; ++j) {
      const __m512 t = _mm512_mul_ps(_mm512_loadu_ps(a.x + i + 16 * j), r);
      q[j] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(t, low), high));
    }
    const __m512i ab = _mm512_add_epi16(_mm512_packs_epi32(q[0], q[1]), zero);
    const __m512i cd = _mm512_add_epi16(_mm512_packs_epi32(q[2], q[3]), zero);
    _mm512_storeu_si512(a.y + i, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd)));
  }
  each(a.n - i, [&](int64_t k, int count) {
    store_u8(a.y + i + k, count, codes(load(a.x + i + k, count, 0.0f) * V{r}, a.zero, a.lo, a.hi));
  });
}

void table(const TableArgs& a) { look_up(a, false); }

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

void mean_pool(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 16) {
    V sum = set1(0);
    for (int i = 0; i < a.count; ++i) sum = sum + load(static_cast<const float*>(a.x[i]) + c, a.n - c, 0);
    store(static_cast<float*>(a.y) + c, a.n - c, sum / set1(a.divisor));
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
