// vdpbf16ps: pairs of bf16 numbers, summed in floats.
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/peak/peak.h"

namespace pw::avx512bf16 {

#define PW_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define PW_DOT(n) "vdpbf16ps %1, %2, %%zmm" #n "\n\t"

int64_t peak_bf16(int64_t repeats) {
  const __m512i x = _mm512_set1_epi16(0x3f40), w = _mm512_set1_epi16(0x3f00);  // 0.75, 0.5
  PW_PEAK_LOOP(PW_EACH_16(PW_CLEAR), PW_EACH_16(PW_DOT), repeats, "v", x, w, PW_CLOBBERS_16);
  return repeats * 16 * 32;
}

}  // namespace pw::avx512bf16

#endif  // __AVX512BF16__
