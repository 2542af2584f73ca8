// Products of bf16 numbers with vdpbf16ps: two a lane.
#if defined(__AVX512BF16__)
#include "ops/gemm_bf16/tile512.h"

namespace pw::avx512bf16 {
namespace {

struct Pairs {
  // As assembly: gcc 12 spills accumulators around such intrinsics.
  static PW_REAL_INLINE void dot(__m512& c, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  }
  template <int NB>
  static PW_REAL_INLINE void row(__m512 (&acc)[NB], __m512i x, const __m512i (&w)[NB]) {
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) dot(acc[j], x, w[j]);
  }
};

}  // namespace

void gemm_bf16(const GemmBf16Args& g) { multiply_bf16<Pairs, 14>(g); }

}  // namespace pw::avx512bf16

#endif  // __AVX512BF16__
