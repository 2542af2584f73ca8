// Float products: fused multiply-adds, up to 6 rows by 16 columns in registers.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "core/kernels.h"

namespace pw::avx2 {
namespace {

template <int MR>
void tile(const GemmF32Args& g, int m, int block) {
  __m256 acc[MR][2];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
  const float* b = g.b + block * g.b_block;
  for (int s = 0; s < g.segments; ++s) {
    const float* a[MR];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int k = 0; k < g.seg_len; ++k, b += 16) {
      const __m256 w0 = _mm256_loadu_ps(b), w1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) {
        const __m256 x = _mm256_set1_ps(a[i][k]);
        acc[i][0] = _mm256_fmadd_ps(x, w0, acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(x, w1, acc[i][1]);
      }
    }
  }
  const int column = 16 * block, left = g.n - column < 16 ? g.n - column : 16;
  for (int i = 0; i < MR; ++i) {
    alignas(32) float y[16];
    if (g.bias) {
      acc[i][0] = _mm256_add_ps(acc[i][0], _mm256_loadu_ps(g.bias + g.n0 + column));
      acc[i][1] = _mm256_add_ps(acc[i][1], _mm256_loadu_ps(g.bias + g.n0 + column + 8));
    }
    _mm256_store_ps(y, acc[i][0]);
    _mm256_store_ps(y + 8, acc[i][1]);
    std::memcpy(g.c + g.c_offset[m + i] + column, y, 4 * left);
  }
}

}  // namespace

void gemm_f32(const GemmF32Args& g) {
  for (int block = 0; block * 16 < g.n; ++block) {
    int m = 0;
    for (; m + 6 <= g.m; m += 6) tile<6>(g, m, block);
    for (; m < g.m; ++m) tile<1>(g, m, block);
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
