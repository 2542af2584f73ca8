// Float products: fused multiply-adds, up to 6 rows by 16 columns in registers.
#if defined(__AVX2__)
#include <utility>

#include "ops/real256.h"

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
        const __m256 x = _mm256_broadcast_ss(a[i] + k);
        acc[i][0] = _mm256_fmadd_ps(x, w0, acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(x, w1, acc[i][1]);
      }
    }
  }
  const int column = 16 * block, left = g.n - column;
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    const int64_t at = g.c_offset[m + i] + column;
    store_real(g.tail, acc[i][0], m + i, column, left, g.c, at);
    store_real(g.tail, acc[i][1], m + i, column + 8, left - 8, g.c, at + 8);
  }
}

using Tile = void (*)(const GemmF32Args&, int, int);

template <int... I>
void rows_of(const GemmF32Args& g, int block, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {tile<I + 1>...};
  constexpr int most = int(sizeof...(I));
  for (int m = 0, pieces = (g.m + most - 1) / most; pieces > 0; --pieces) {
    const int rows = (g.m - m + pieces - 1) / pieces;
    tiles[rows - 1](g, m, block);
    m += rows;
  }
}

}  // namespace

void gemm_f32(const GemmF32Args& g) {
  for (int block = 0; block * 16 < g.n; ++block) rows_of(g, block, std::make_integer_sequence<int, 6>());
}

}  // namespace pw::avx2

#endif  // __AVX2__
