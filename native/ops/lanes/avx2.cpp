#if defined(__AVX2__)
#include <cstring>

#include "core/functions.h"
#include "core/kernels.h"
#include "ops/lanes/v16_avx2.h"

namespace pw::avx2 {

#include "ops/lanes/lanes.inl"

void quantize(const QuantizeArgs& a) {
  const V r = set1(a.r);
  each(a.n, [&](int64_t i, int count) {
    store_u8(a.y + i, count, codes(load(a.x + i, count, 0.0f) * r, a.zero, a.lo, a.hi));
  });
}

void interleave(const InterleaveArgs& a) {
  uint8_t* __restrict y = a.y;
  const uint8_t *__restrict x0 = a.x[0], *__restrict x1 = a.x[1], *__restrict x2 = a.x[2], *__restrict x3 = a.x[3];
  switch (a.planes) {
    case 1: std::memcpy(y, x0, a.n); break;
    case 2:
      for (int64_t i = 0; i < a.n; ++i) y[2 * i] = x0[i], y[2 * i + 1] = x1[i];
      break;
    case 3:
      for (int64_t i = 0; i < a.n; ++i) y[3 * i] = x0[i], y[3 * i + 1] = x1[i], y[3 * i + 2] = x2[i];
      break;
    default:
      for (int64_t i = 0; i < a.n; ++i) y[4 * i] = x0[i], y[4 * i + 1] = x1[i], y[4 * i + 2] = x2[i], y[4 * i + 3] = x3[i];
  }
}

void max_pool_u8(const PoolArgs& a) {
  int c = 0;
  for (; c + 32 <= a.n; c += 32) {
    __m256i best = _mm256_setzero_si256();
    for (int i = 0; i < a.count; ++i) {
      const uint8_t* x = static_cast<const uint8_t*>(a.x[i]) + c;
      best = _mm256_max_epu8(best, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint8_t*>(a.y) + c), best);
  }
  for (; c < a.n; ++c) {
    uint8_t best = 0;
    for (int i = 0; i < a.count; ++i) {
      const uint8_t v = static_cast<const uint8_t*>(a.x[i])[c];
      best = v > best ? v : best;
    }
    static_cast<uint8_t*>(a.y)[c] = best;
  }
}

void sum_pool(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 16) {
    const int count = a.n - c < 16 ? a.n - c : 16;
    I sum = set1i(-a.zero * a.count);
    for (int i = 0; i < a.count; ++i) sum = sum + load_u8(static_cast<const uint8_t*>(a.x[i]) + c, count);
    alignas(32) int32_t out[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), sum.a);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 8), sum.b);
    std::memcpy(static_cast<int32_t*>(a.y) + c, out, 4 * count);
  }
}

void mean_pool(const PoolArgs& a) {
  int c = 0;
  for (; c + 8 <= a.n; c += 8) {
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < a.count; ++i) sum = _mm256_add_ps(sum, _mm256_loadu_ps(static_cast<const float*>(a.x[i]) + c));
    _mm256_storeu_ps(static_cast<float*>(a.y) + c, _mm256_div_ps(sum, _mm256_set1_ps(a.divisor)));
  }
  for (; c < a.n; ++c) {
    float sum = 0;
    for (int i = 0; i < a.count; ++i) sum += static_cast<const float*>(a.x[i])[c];
    static_cast<float*>(a.y)[c] = sum / a.divisor;
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
