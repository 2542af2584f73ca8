// Defines the products of unsigned activations and signed weights of 8 and 16 bits, and what is done to an accumulator.
#include <cmath>

#include "ops/scalar.h"

namespace pw::scalar {

namespace {

template <class T>
void product(const GemmArgs& g) {
  for (int m = 0; m < g.m; ++m) {
    if (g.c_offset[m] < 0) continue;
    for (int n = 0; n < g.n; ++n) {
      const T* b = reinterpret_cast<const T*>(g.b + (n / 16) * g.b_block) + (n % 16) * 4;
      int32_t acc = 0;
      for (int s = 0; s < g.segments; ++s) {
        const uint8_t* a = g.a + g.row_offset[m] + g.seg_offset[s];
        for (int k = 0; k < g.seg_len; ++k) acc += int32_t(a[k]) * int32_t(b[(k / 4) * 64 + (k % 4)]);
        b += int64_t(g.seg_pad / 4) * 64;
      }
      const Epilogue& e = *g.epilogue;
      const uint8_t* r = e.residual ? e.residual + g.r_offset[m] + n : nullptr;
      const float* addend = e.addend ? e.addend + g.r_offset[m] + n : nullptr;
      store_one(e, acc, g.n0 + n, g.m0 + m, r, addend, g.c, g.c_offset[m] + n);
    }
  }
}

}  // namespace

void gemm(const GemmArgs& g) { product<int8_t>(g); }
void gemm_wide(const GemmArgs& g) { product<int16_t>(g); }

void epilogue(const EpilogueArgs& a) {
  for (int n = 0; n < a.n; ++n)
    store_one(*a.epilogue, a.acc[n], n, a.row, a.residual ? a.residual + n : nullptr, a.addend ? a.addend + n : nullptr,
              a.y, n);
}

}  // namespace pw::scalar
