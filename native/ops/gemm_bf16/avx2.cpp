// Products of bf16 numbers, widened: up to 4 rows by 16 columns in registers.
#if defined(__AVX2__)
#include <utility>

#include "ops/real256.h"

namespace pw::avx2 {
namespace {

inline __m256 low(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 high(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

inline int32_t pair_at(const uint16_t* p, bool whole) {
  if (!whole) return p[0];
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

template <int MR>
void tile(const GemmBf16Args& g, int m, int block) {
  __m256 acc[MR][2];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
  const uint16_t* b = g.b + block * g.b_block;
  for (int s = 0; s < g.segments; ++s) {
    const uint16_t* a[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int k = 0; k < g.seg_len; k += 2, b += 32) {
      const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 16));
      const bool whole = k + 1 < g.seg_len;
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m256i x = _mm256_set1_epi32(pair_at(a[i] + k, whole));
        acc[i][0] = _mm256_fmadd_ps(low(x), low(w0), acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(low(x), low(w1), acc[i][1]);
        acc[i][0] = _mm256_fmadd_ps(high(x), high(w0), acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(high(x), high(w1), acc[i][1]);
      }
    }
  }
  const int column = 16 * block, left = g.n - column;
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    const int64_t at = g.c_offset[m + i] + column;
    store_real(g.tail, acc[i][0], m + i, column, left, g.c, at);
    store_real(g.tail, acc[i][1], m + i, column + 8, left - 8, g.c, at + 8);
  }
}

using Tile = void (*)(const GemmBf16Args&, int, int);

template <int... I>
void rows_of(const GemmBf16Args& g, int block, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {tile<I + 1>...};
  constexpr int most = int(sizeof...(I));
  for (int m = 0, pieces = (g.m + most - 1) / most; pieces > 0; --pieces) {
    const int rows = (g.m - m + pieces - 1) / pieces;
    tiles[rows - 1](g, m, block);
    m += rows;
  }
}

}  // namespace

void gemm_bf16(const GemmBf16Args& g) {
  for (int block = 0; block * 16 < g.n; ++block) rows_of(g, block, std::make_integer_sequence<int, 4>());
}

}  // namespace pw::avx2

#endif  // __AVX2__
