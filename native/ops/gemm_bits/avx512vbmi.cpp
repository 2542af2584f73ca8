// Four bits by a permute of bytes; one and two bits need no table.
#if defined(__AVX512VBMI__)
#include "ops/gemm_bits/panel512.h"

namespace pw {

namespace avx512 {
void gemm_bits(const GemmBitsArgs&);
}

namespace avx512vbmi {

void gemm_bits(const GemmBitsArgs& g) {
  if (g.bits == 4) return all_rows<4>(g);
  avx512::gemm_bits(g);
}

}  // namespace avx512vbmi
}  // namespace pw

#endif  // __AVX512VBMI__
