// How packed weights of 4 bits are read with AVX-512. Internal to the unit that includes it.
#pragma once

#include "ops/avx512.h"

namespace pw {
namespace {

// The codes of the four blocks of a quad.
PW_INLINE void fields(const uint8_t* b, __m512i* v) {
  constexpr int kAhead = 2048;  // bytes that the stream of codes is fetched ahead
  _mm_prefetch(reinterpret_cast<const char*>(b + kAhead), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(b + kAhead + 64), _MM_HINT_T0);
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i pair = _mm512_loadu_si512(b + 64 * h);
    v[2 * h] = _mm512_and_si512(pair, low);
    v[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
  }
}

template <int SCALE>
PW_INLINE __m512 scale_at(const uint8_t* p, int block) {
  if constexpr (SCALE == 2) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * block)));
  return _mm512_loadu_ps(p + 64 * block);
}

}  // namespace
}  // namespace pw
