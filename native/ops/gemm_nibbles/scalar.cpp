// Defines how packed weights of 4 bits with one scale per group are read.
#include <cstring>

#include "core/functions.h"
#include "ops/scalar.h"

namespace pw::scalar {

void gemm_nibbles(const GemmNibblesArgs& g) {
  const int64_t bytes = int64_t(g.group_len) * 32 + 64 * g.scale_bytes;  // of a group
  for (int m = 0; m < g.m; ++m) {
    const int32_t zero = g.row_zero[int64_t(m) * g.row_step];
    for (int n = 0; n < g.n; ++n) {
      const int column = n % 64;
      const uint8_t* b = g.b + n / 64 * g.b_panel;
      const uint8_t* a = g.a + m * g.lda;
      float t = 0;
      for (int group = 0; group < g.groups; ++group, a += g.group_len, b += bytes) {
        int32_t acc = 0;
        for (int k = 0; k < g.group_len; ++k) {
          const int pair = b[k / 4 * 128 + column / 32 * 64 + column % 16 * 4 + k % 4];
          acc += (int32_t(a[k]) - zero) * ((column / 16 % 2 ? pair >> 4 : pair & 15) - 8);
        }
        const uint8_t* at = b + int64_t(g.group_len) * 32 + column * g.scale_bytes;
        float scale;
        if (g.scale_bytes == 2) {
          uint16_t half;
          std::memcpy(&half, at, 2);
          scale = fn::half_to_float(half);
        } else {
          std::memcpy(&scale, at, 4);
        }
        t = t + float(acc) * scale;
      }
      t = t * g.row_scale[int64_t(m) * g.row_step];
      g.c[m * g.ldc + n] = g.bias ? t + g.bias[n] : t;
    }
  }
}

}  // namespace pw::scalar
