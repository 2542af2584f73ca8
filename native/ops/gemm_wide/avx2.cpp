// u8 x s16 products: bytes are widened, multiplied and added in pairs (vpmaddwd), exact.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "ops/avx2.h"

namespace pw::avx2 {
namespace {

// MR rows times one block of 16 columns; accumulator j of a row holds columns 4j .. 4j + 3, two partial sums each.
template <int MR>
void tile(const GemmArgs& g, int m, int block) {
  __m256i acc[MR][4];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm256_setzero_si256();
  const int8_t* b = g.b + block * g.b_block;
  const int quads = (g.seg_len + 3) / 4;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 128;
  for (int s = 0; s < g.segments; ++s) {
    const uint8_t* a[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int q = 0; q < quads; ++q, b += 128) {
      __m256i x[MR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        int32_t v;
        std::memcpy(&v, a[i] + 4 * q, 4);
        x[i] = _mm256_cvtepu8_epi16(_mm_set1_epi32(v));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * j));
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(x[i], w));
      }
    }
    b += skip;
  }
  const Epilogue& e = *g.epilogue;
  const int column = 16 * block;
  for (int i = 0; i < MR; ++i) {
    // pairs of partial sums to columns: hadd works in halves, the permutation puts them in order
    const __m256i low = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[i][0], acc[i][1]), 0xd8);
    const __m256i high = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[i][2], acc[i][3]), 0xd8);
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    store16(e, low, high, g.n0 + column, g.n - column, g.m0 + m + i, r, addend, g.c, g.c_offset[m + i] + column);
  }
}

}  // namespace

void gemm_wide(const GemmArgs& g) {
  constexpr int kRows = 24;  // stay in the first cache while all columns pass
  for (int from = 0; from < g.m; from += kRows)
    for (int block = 0, end = from + kRows < g.m ? from + kRows : g.m; block * 16 < g.n; ++block) {
      int m = from;
      for (; m + 2 <= end; m += 2) tile<2>(g, m, block);
      for (; m < end; ++m) tile<1>(g, m, block);
    }
}

}  // namespace pw::avx2

#endif  // __AVX2__
