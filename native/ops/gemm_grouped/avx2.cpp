// Grouped weights without VNNI, exact: weights of 4 bits are multiplied as bytes and added in 16 bits, which cannot
// overflow (8 * 2 * 255 * 8 = 32640); those of 8 bits are widened first.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "ops/avx2.h"

namespace pw::avx2 {
namespace {

// One group of MR rows times 16 columns of 4-bit weights, added to sum[row][half].
template <int MR>
inline void group4(const uint8_t* a, int64_t lda, const int8_t* b, int quads, __m256i (*sum)[2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int q = 0; q < quads;) {
    const int end = q + 8 < quads ? q + 8 : quads;
    __m256i pairs[MR][2];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) pairs[i][0] = pairs[i][1] = _mm256_setzero_si256();
    for (; q < end; ++q) {
      const __m256i low = load(b + 64 * q), high = load(b + 64 * q + 32);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m256i x = broadcast4(a + i * lda + 4 * q);
        pairs[i][0] = _mm256_add_epi16(pairs[i][0], _mm256_maddubs_epi16(x, low));
        pairs[i][1] = _mm256_add_epi16(pairs[i][1], _mm256_maddubs_epi16(x, high));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) sum[i][h] = _mm256_add_epi32(sum[i][h], _mm256_madd_epi16(pairs[i][h], ones));
  }
}

// The same for 8-bit weights; partial sums of four columns a register, which hadd and a permutation put in order.
template <int MR>
inline void group8(const uint8_t* a, int64_t lda, const int8_t* b, int quads, __m256i (*sum)[2]) {
  __m256i acc[MR][4];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm256_setzero_si256();
  for (int q = 0; q < quads; ++q) {
    __m256i x[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) x[i] = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(broadcast4(a + i * lda + 4 * q)));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 64 * q + 16 * j)));
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(x[i], w));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i paired = _mm256_hadd_epi32(acc[i][2 * h], acc[i][2 * h + 1]);
      sum[i][h] = _mm256_add_epi32(sum[i][h], _mm256_permute4x64_epi64(paired, 0xd8));
    }
}

// MR rows times one block of 16 columns.
template <int MR, int Bits>
void tile(const GemmGroupedArgs& g, int m, int block) {
  const int quads = (g.group_len + 3) / 4, column = 16 * block;
  const int8_t* b = g.b + block * g.b_block;
  const uint8_t* a = g.a + m * g.lda;
  __m256 t[MR][2];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) t[i][0] = t[i][1] = _mm256_setzero_ps();
  for (int group = 0; group < g.groups; ++group, a += g.group_len, b += int64_t(quads) * 64) {
    const int64_t at = group * g.step + column;
    __m256i sum[MR][2];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const __m256i zero = _mm256_set1_epi32(g.row_zero[int64_t(m + i) * g.row_step]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) sum[i][h] = _mm256_mullo_epi32(zero, load(g.colsum + at + 8 * h));
    }
    if (Bits == 4) group4<MR>(a, g.lda, b, quads, sum);
    else group8<MR>(a, g.lda, b, quads, sum);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][h]), _mm256_loadu_ps(g.scale + at + 8 * h));
        t[i][h] = _mm256_add_ps(t[i][h], part);
      }
  }
  const int count = g.n - column < 16 ? g.n - column : 16;
  for (int i = 0; i < MR; ++i) {
    const __m256 row = _mm256_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]);
    alignas(32) float y[16];
    for (int h = 0; h < 2; ++h) {
      t[i][h] = _mm256_mul_ps(t[i][h], row);
      if (g.bias) t[i][h] = _mm256_add_ps(t[i][h], _mm256_loadu_ps(g.bias + column + 8 * h));
      _mm256_store_ps(y + 8 * h, t[i][h]);
    }
    std::memcpy(g.c + (m + i) * g.ldc + column, y, size_t(4 * count));
  }
}

template <int MR, int Bits>
void rows_of(const GemmGroupedArgs& g, int block) {
  int m = 0;
  for (; m + MR <= g.m; m += MR) tile<MR, Bits>(g, m, block);
  for (; m < g.m; ++m) tile<1, Bits>(g, m, block);
}

}  // namespace

void gemm_grouped(const GemmGroupedArgs& g) {
  for (int block = 0; block * 16 < g.n; ++block) {
    if (g.bits == 4) rows_of<4, 4>(g, block);
    else rows_of<2, 8>(g, block);
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
