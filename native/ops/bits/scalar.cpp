// Defines products of bits, and how values become bits.
#include <cstring>

#include "ops/bits/one.h"
#include "ops/scalar.h"

namespace pw::scalar {

namespace {

void row(const BitGemmArgs& g, const BitLine& l, int m) {
  const int32_t none[16] = {};
  const int32_t* base = g.base_of(l, m);
  const int64_t at = l.c + m * g.c_step, other = l.r + m * g.r_step;
  for (int n = 0; n < g.n; ++n) {
    const uint32_t* b = g.b + (n / 16) * g.b_block + n % 16;
    int32_t count = 0;
    for (int s = 0; s < g.segments; ++s)
      for (int k = 0; k < g.seg_words; ++k, b += 16) {
        uint32_t a;
        std::memcpy(&a, g.a + l.a + m * g.a_step + g.seg_offset[s] + 4 * k, 4);
        if (k == g.seg_words - 1) a &= g.tail;
        count += __builtin_popcount(a ^ *b);
      }
    const int column = g.n0 + n;
    const int32_t acc = base[n] - 2 * count;
    if (g.threshold) {
      const bool bit = (acc >= g.threshold[column]) != ((g.flip[column / 16] >> (column % 16)) & 1);
      uint8_t& y = static_cast<uint8_t*>(g.c)[at + n / 8];
      y = uint8_t((n % 8 ? y : 0) | (bit << (n % 8)));
      continue;
    }
    Epilogue e = *g.epilogue;
    e.bias = none - column;  // the base holds it
    const uint8_t* r = e.residual ? e.residual + other + n : nullptr;
    const float* addend = e.addend ? e.addend + other + n : nullptr;
    store_one(e, acc, column, l.m0 + m, r, addend, g.c, at + n);
  }
}

}  // namespace

void bit_gemm(const BitGemmArgs& g) {
  for (const BitLine* l = g.line; l != g.line + g.lines; ++l)
    for (int m = 0; m < l->m; ++m) row(g, *l, m);
  bits::signs_of_results(g);
}

void sign_f32(const SignArgs& a) { bits::signs<float>(a); }
void sign_u8(const SignArgs& a) { bits::signs<uint8_t>(a); }
void sign_i32(const SignArgs& a) { bits::signs<int32_t>(a); }

}  // namespace pw::scalar
