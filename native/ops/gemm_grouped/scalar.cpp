// Defines the product of activations ranged at run time and weights of one scale per group.
#include "ops/scalar.h"

namespace pw::scalar {

void gemm_grouped(const GemmGroupedArgs& g) {
  const int quads = (g.group_len + 3) / 4;
  for (int m = 0; m < g.m; ++m) {
    const int32_t zero = g.row_zero[int64_t(m) * g.row_step];
    for (int n = 0; n < g.n; ++n) {
      const int8_t* b = g.b + (n / 16) * g.b_block + (n % 16) * 4;
      const uint8_t* a = g.a + m * g.lda;
      float t = 0;
      for (int group = 0; group < g.groups; ++group, a += g.group_len, b += quads * 64) {
        int32_t acc = 0;
        for (int k = 0; k < g.group_len; ++k) acc += (int32_t(a[k]) - zero) * int32_t(b[(k / 4) * 64 + (k % 4)]);
        t = t + float(acc) * g.scale[group * g.step + n];
      }
      t = t * g.row_scale[int64_t(m) * g.row_step];
      g.c[m * g.ldc + n] = g.bias ? t + g.bias[n] : t;
    }
  }
}

}  // namespace pw::scalar
