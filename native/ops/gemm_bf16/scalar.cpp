// Products of bf16 numbers, each exact in a float; the order of the sum is the kernel's own.
#include "ops/real.h"

namespace pw::scalar {

void gemm_bf16(const GemmBf16Args& g) {
  const int64_t pairs = (g.seg_len + 1) / 2;
  for (int m = 0; m < g.m; ++m)
    for (int n = 0; n < g.n; ++n) {
      const uint16_t* b = g.b + (n / 16) * g.b_block + n % 16 * 2;
      float sum = 0;
      for (int s = 0; s < g.segments; ++s, b += pairs * 32) {
        const uint16_t* a = g.a + g.row_offset[m] + g.seg_offset[s];
        for (int k = 0; k < g.seg_len; ++k) sum += from_bf16(a[k]) * from_bf16(b[k / 2 * 32 + k % 2]);
      }
      store_real(g.tail, sum, m, n, g.c, g.c_offset[m] + n);
    }
}

}  // namespace pw::scalar
