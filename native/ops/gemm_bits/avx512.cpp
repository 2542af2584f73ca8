#if defined(__AVX512VNNI__)
#include "ops/gemm_bits/panel512.h"

namespace pw::avx512 {

void gemm_bits(const GemmBitsArgs& g) {
  switch (g.bits) {
    case 1: return all_rows<1>(g);
    case 2: return all_rows<2>(g);
    default: return all_rows<4>(g);
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
