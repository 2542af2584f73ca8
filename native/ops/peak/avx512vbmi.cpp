// Bits that differ, counted by vpopcntd.
#if defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/peak/peak.h"

namespace pw::avx512vbmi {

#define PW_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define PW_WORD(n, i)                                                          \
  "vpxord %1, %2, %%zmm" #i "\n\tvpopcntd %%zmm" #i ", %%zmm" #i "\n\t"         \
  "vpaddd %%zmm" #i ", %%zmm" #n ", %%zmm" #n "\n\t"

int64_t peak_bits(int64_t repeats) {
  const __m512i x = _mm512_set1_epi32(0x5a5a1234), w = _mm512_set1_epi32(0x0ff0abcd);
  PW_PEAK_LOOP(PW_EACH_8(PW_CLEAR),
               PW_WORD(0, 8) PW_WORD(1, 9) PW_WORD(2, 10) PW_WORD(3, 11) PW_WORD(4, 12) PW_WORD(5, 13) PW_WORD(6, 14)
                   PW_WORD(7, 15),
               repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 8 * 512;
}

}  // namespace pw::avx512vbmi

#endif  // __AVX512VPOPCNTDQ__
