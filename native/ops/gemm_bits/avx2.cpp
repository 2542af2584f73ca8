// Packed codes expanded in registers: codes of one and two bits are multiplied as unsigned bytes, whose sums of pairs fit
// 16 bits; codes of four bits go through a table of 16 bytes and are widened.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "ops/avx2.h"

namespace pw::avx2 {
namespace {

int32_t four(const GemmBitsArgs& g, const uint8_t* a, int q) {
  int32_t v = 0;
  std::memcpy(&v, a + 4 * q, size_t(g.k - 4 * q < 4 ? g.k - 4 * q : 4));
  return v;
}

void store(const GemmBitsArgs& g, __m256i acc, int m, int column) {
  if (column >= g.n) return;
  const Epilogue& e = *g.epilogue;
  const int64_t r = g.r_offset[m] + column;
  store8(e, acc, g.n0 + column, g.n - column, g.m0 + m, e.residual ? e.residual + r : nullptr,
         e.addend ? e.addend + r : nullptr, g.c, g.c_offset[m] + column);
}

// One row times one panel; half h of a block holds columns 8 h .. 8 h + 7.
template <int BITS>
void affine(const GemmBitsArgs& g, const uint8_t* b, int m, int column, __m256i constant) {
  constexpr int kBlocks = 8 / BITS;
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
  const uint8_t* a = g.a + m * g.lda;
  __m256i acc[kBlocks][2];
  for (auto& block : acc) block[0] = block[1] = _mm256_setzero_si256();
  for (int q = 0; 4 * q < g.k; ++q) {
    const __m256i x = _mm256_set1_epi32(four(g, a, q));
    for (int h = 0; h < 2; ++h) {
      __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 64 * int64_t(q) + 32 * h));
      if (BITS == 2) w = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
#pragma GCC unroll 8
      for (int j = 0; j < kBlocks; ++j) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(w, BITS * j), mask);
        acc[j][h] = _mm256_add_epi32(acc[j][h], _mm256_madd_epi16(_mm256_maddubs_epi16(x, codes), ones));
      }
    }
  }
  const __m256i step = _mm256_set1_epi32(g.step);
  for (int j = 0; j < kBlocks; ++j)
    for (int h = 0; h < 2; ++h)
      store(g, _mm256_add_epi32(_mm256_mullo_epi32(acc[j][h], step), constant), m, column + 16 * j + 8 * h);
}

// One row times a pair of blocks of a panel: the nibbles of one vector of 64 bytes.
void nibbles(const GemmBitsArgs& g, const uint8_t* b, int m, int column) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g.table)));
  const uint8_t* a = g.a + m * g.lda;
  __m256i acc[2][4];  // of a block, columns 4 i .. 4 i + 3, two partial sums each
  for (auto& block : acc)
    for (auto& v : block) v = _mm256_setzero_si256();
  for (int q = 0; 4 * q < g.k; ++q) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_set1_epi32(four(g, a, q)));
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 128 * int64_t(q) + 32 * h));
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i v = _mm256_shuffle_epi8(table, _mm256_and_si256(j ? _mm256_srli_epi16(w, 4) : w, mask));
        const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v));
        const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1));
        acc[j][2 * h] = _mm256_add_epi32(acc[j][2 * h], _mm256_madd_epi16(x, low));
        acc[j][2 * h + 1] = _mm256_add_epi32(acc[j][2 * h + 1], _mm256_madd_epi16(x, high));
      }
    }
  }
  for (int j = 0; j < 2; ++j)
    for (int h = 0; h < 2; ++h)
      store(g, _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[j][2 * h], acc[j][2 * h + 1]), 0xd8), m,
            column + 16 * j + 8 * h);
}

}  // namespace

void gemm_bits(const GemmBitsArgs& g) {
  const int width = g.bits == 1 ? 128 : 64;
  for (int m = 0; m < g.m; ++m) {
    int32_t sum = 0;
    for (int k = 0; k < g.k; ++k) sum += g.a[m * g.lda + k];
    const __m256i constant = _mm256_set1_epi32(int32_t(uint32_t(sum) * uint32_t(g.base)));
    for (int column = 0; column < g.n; column += width) {
      const uint8_t* b = g.b + column / width * g.b_panel;
      switch (g.bits) {
        case 1: affine<1>(g, b, m, column, constant); break;
        case 2: affine<2>(g, b, m, column, constant); break;
        default:
          nibbles(g, b, m, column);
          nibbles(g, b + 64, m, column + 32);
      }
    }
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
