// Float products; the order of the sum is the kernel's own.
#include "ops/real.h"

namespace pw::scalar {

void gemm_f32(const GemmF32Args& g) {
  for (int m = 0; m < g.m; ++m)
    for (int n = 0; n < g.n; ++n) {
      const float* b = g.b + (n / 16) * g.b_block + n % 16;
      float sum = 0;
      for (int s = 0; s < g.segments; ++s) {
        const float* a = g.a + g.row_offset[m] + g.seg_offset[s];
        for (int k = 0; k < g.seg_len; ++k, b += 16) sum += a[k] * *b;
      }
      store_real(g.tail, sum, m, n, g.c, g.c_offset[m] + n);
    }
}

}  // namespace pw::scalar
