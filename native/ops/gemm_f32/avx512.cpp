// Float products: fused multiply-adds, up to 14 rows by 32 columns in registers.
#if defined(__AVX512VNNI__)
#include <utility>

#include "ops/real512.h"

namespace pw::avx512 {
namespace {

template <int MR, int NB>
void tile(const GemmF32Args& g, int m, int block) {
  __m512 acc[MR][NB];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_ps();
  const float* b = g.b + block * g.b_block;
  for (int s = 0; s < g.segments; ++s) {
    const float* a[MR];
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int k = 0; k < g.seg_len; ++k) {
      __m512 w[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_ps(b + j * g.b_block);
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i) {
        const __m512 x = _mm512_set1_ps(a[i][k]);
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_fmadd_ps(x, w[j], acc[i][j]);
      }
      b += 16;
    }
  }
  __m512 done[MR * NB];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) done[i * NB + j] = acc[i][j];
  store_tile<NB>(g, done, MR, m, block);
}

using Tile = void (*)(const GemmF32Args&, int, int);

template <int NB, int... I>
void rows_of(const GemmF32Args& g, int block, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {tile<I + 1, NB>...};
  constexpr int most = int(sizeof...(I));
  // rows in tiles of nearly one size: no short tile at the end
  for (int m = 0, pieces = (g.m + most - 1) / most; pieces > 0; --pieces) {
    const int rows = (g.m - m + pieces - 1) / pieces;
    tiles[rows - 1](g, m, block);
    m += rows;
  }
}

}  // namespace

void gemm_f32(const GemmF32Args& g) {
  const int blocks = (g.n + 15) / 16;
  int block = 0;
  if (g.m <= 6)
    for (; block + 4 <= blocks; block += 4) rows_of<4>(g, block, std::make_integer_sequence<int, 6>());
  for (; block + 2 <= blocks; block += 2) rows_of<2>(g, block, std::make_integer_sequence<int, 14>());
  if (block < blocks) rows_of<1>(g, block, std::make_integer_sequence<int, 14>());
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
