// Defines the product of unsigned activations and packed codes of a few bits.
#include "ops/scalar.h"

namespace pw::scalar {
namespace {

int code_of(const GemmBitsArgs& g, int column, int k) {
  const int panel = g.bits == 1 ? 128 : 64, fields = 8 / g.bits;
  const int block = column % panel / 16, field = block % fields;
  const uint8_t* quad = g.b + column / panel * g.b_panel + int64_t(k / 4) * (panel / 2 * g.bits);
  const int byte = quad[block / fields * 64 + column % 16 * 4 + k % 4];
  const int code = byte >> (field * g.bits) & ((1 << g.bits) - 1);
  return g.bits == 2 && field == 3 ? code ^ 2 : code;
}

}  // namespace

void gemm_bits(const GemmBitsArgs& g) {
  const Epilogue& e = *g.epilogue;
  for (int m = 0; m < g.m; ++m)
    for (int n = 0; n < g.n; ++n) {
      int32_t acc = 0;
      for (int k = 0; k < g.k; ++k) acc += int32_t(g.a[m * g.lda + k]) * g.table[code_of(g, n, k)];
      const int64_t r = g.r_offset[m] + n;
      store_one(e, acc, g.n0 + n, g.m0 + m, e.residual ? e.residual + r : nullptr, e.addend ? e.addend + r : nullptr, g.c,
                g.c_offset[m] + n);
    }
}

}  // namespace pw::scalar
