#if defined(__AVX2__)
#include <cstring>

#include "core/functions.h"
#include "core/kernels.h"
#include "ops/lanes/v16_avx2.h"

namespace pw::avx2 {

#include "ops/lanes/lanes.inl"

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

}  // namespace pw::avx2

#endif  // __AVX2__
