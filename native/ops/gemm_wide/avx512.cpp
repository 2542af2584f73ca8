// u8 x s16 products with vpdpwssd: four bytes are widened and broadcast against packed weights.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

// MR rows times NB blocks of 16 columns from row m on. Two accumulators a block: columns 0 .. 7 and 8 .. 15, of each the
// sums of the first and of the second pairs side by side.
template <int MR, int NB, Path path>
int tiles(const GemmArgs& g, const Finish& f, int m, int block) {
  const Epilogue& e = f.e;
  const int column = 16 * block, quads = (g.seg_len + 3) / 4;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 128;
  const Columns columns(g.n0 + column, g.n - column, NB);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  for (; m + MR <= g.m; m += MR) {
    __m512i acc[MR][2 * NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < 2 * NB; ++j) acc[i][j] = _mm512_setzero_si512();
    const int8_t* b = g.b + block * g.b_block;
    for (int s = 0; s < g.segments; ++s) {
      const uint8_t* a[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
      for (int q = 0; q < quads; ++q, b += 128) {
        __m512i w[2 * NB];
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NB; ++j) w[j] = _mm512_loadu_si512(b + j / 2 * g.b_block + j % 2 * 64);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          int32_t v;
          std::memcpy(&v, a[i] + 4 * q, 4);
          const __m512i x = _mm512_cvtepu8_epi16(_mm256_set1_epi32(v));
#pragma GCC unroll 8
          for (int j = 0; j < 2 * NB; ++j) acc[i][j] = _mm512_dpwssd_epi32(acc[i][j], x, w[j]);
        }
      }
      b += skip;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      __m512i row[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        const __m512i first = _mm512_permutex2var_epi32(acc[i][2 * j], even, acc[i][2 * j + 1]);
        const __m512i second = _mm512_permutex2var_epi32(acc[i][2 * j], odd, acc[i][2 * j + 1]);
        row[j] = _mm512_add_epi32(_mm512_add_epi32(first, second), _mm512_loadu_si512(e.bias + g.n0 + column + 16 * j));
      }
      const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
      const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
      store_row<NB, path>(f, row, columns, g.m0 + m + i, r, addend, g.c, g.c_offset[m + i] + column);
    }
  }
  return m;
}

}  // namespace

void gemm_wide(const GemmArgs& g) {
  const Finish f(*g.epilogue);
  const int blocks = (g.n + 15) / 16;
  with_path(path_of(*g.epilogue), [&](auto p) {
    int block = 0;
    for (; block + 2 <= blocks; block += 2) tiles<1, 2, p()>(g, f, tiles<4, 2, p()>(g, f, 0, block), block);
    if (block < blocks) tiles<1, 1, p()>(g, f, tiles<8, 1, p()>(g, f, 0, block), block);
  });
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
