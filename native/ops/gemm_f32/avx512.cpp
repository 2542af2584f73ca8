// Float products: fused multiply-adds, up to 12 rows by 32 columns in registers.
#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include "core/kernels.h"

namespace pw::avx512 {
namespace {

template <int MR, int NB>
void tile(const GemmF32Args& g, int m, int block) {
  __m512 acc[MR][NB];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_ps();
  const float* b = g.b + block * g.b_block;
  for (int s = 0; s < g.segments; ++s) {
    const float* a[MR];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int k = 0; k < g.seg_len; ++k) {
      __m512 w[NB];
#pragma GCC unroll 2
      for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_ps(b + j * g.b_block);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const __m512 x = _mm512_set1_ps(a[i][k]);
#pragma GCC unroll 2
        for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_fmadd_ps(x, w[j], acc[i][j]);
      }
      b += 16;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NB; ++j) {
      const int column = 16 * (block + j), left = g.n - column;
      if (left <= 0) continue;
      const __mmask16 mask = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
      __m512 y = acc[i][j];
      if (g.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(g.bias + g.n0 + column));
      _mm512_mask_storeu_ps(g.c + g.c_offset[m + i] + column, mask, y);
    }
}

template <int MR, int NB>
void rows_of(const GemmF32Args& g, int block) {
  int m = 0;
  for (; m + MR <= g.m; m += MR) tile<MR, NB>(g, m, block);
  for (; m + 4 <= g.m; m += 4) tile<4, NB>(g, m, block);
  for (; m < g.m; ++m) tile<1, NB>(g, m, block);
}

}  // namespace

void gemm_f32(const GemmF32Args& g) {
  const int blocks = (g.n + 15) / 16;
  int block = 0;
  for (; block + 2 <= blocks; block += 2) rows_of<12, 2>(g, block);
  if (block < blocks) rows_of<12, 1>(g, block);
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
