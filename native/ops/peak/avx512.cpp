// vpdpbusd and float multiply-adds on 512 bits.
#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/peak/peak.h"

namespace pw::avx512 {

#define PW_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define PW_DOT(n) "vpdpbusd %1, %2, %%zmm" #n "\n\t"
#define PW_FMA(n) "vfmadd231ps %1, %2, %%zmm" #n "\n\t"

int64_t peak_i8(int64_t repeats) {
  const __m512i x = _mm512_set1_epi8(91), w = _mm512_set1_epi8(-37);
  PW_PEAK_LOOP(PW_EACH_16(PW_CLEAR), PW_EACH_16(PW_DOT), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 16 * 64;
}

int64_t peak_f32(int64_t repeats) {
  const __m512 x = _mm512_set1_ps(0.75f), w = _mm512_set1_ps(0.5f);
  PW_PEAK_LOOP(PW_EACH_16(PW_CLEAR), PW_EACH_16(PW_FMA), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 16 * 16;
}

void read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  for (int64_t at = 0; at + 512 <= bytes; at += 512)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i v = _mm512_loadu_si512(p + at + 64 * i);
      __asm__ volatile("" : : "v"(v));
    }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
