// Floats to bf16 and back, and the greatest of bf16 numbers, sixteen at a time.
#if defined(__AVX512VNNI__)
#include "ops/real512.h"

namespace pw::avx512 {

void to_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; i += 16) {
    const __mmask16 mask = first16(int(a.n - i < 16 ? a.n - i : 16));
    store_values(a.y, i, true, mask, load_real(a.x, i, false, mask));
  }
}

void widen_bf16(const ConvertArgs& a) {
  for (int64_t i = 0; i < a.n; i += 16) {
    const __mmask16 mask = first16(int(a.n - i < 16 ? a.n - i : 16));
    store_values(a.y, i, false, mask, load_real(a.x, i, true, mask));
  }
}

void max_pool_bf16(const PoolArgs& a) {
  for (int c = 0; c < a.n; c += 16) {
    const __mmask16 mask = first16(a.n - c);
    __m512 best = _mm512_set1_ps(-__builtin_inff());
    for (int i = 0; i < a.count; ++i) best = _mm512_max_ps(load_real(a.x[i], c, true, mask), best);
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(best), 16));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + c, mask, high);
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
