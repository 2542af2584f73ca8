// Packed codes expanded in registers: codes of one and two bits are multiplied as unsigned bytes, whose sums of pairs fit
// 16 bits; codes of four bits go through a table of 16 bytes and are widened.
#if defined(__AVX2__)
#include <immintrin.h>

#include <algorithm>
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

// Quads whose products of one field fit 16 bits: pairs of 255 times a field of its nibble, 8 or 12 at most.
template <int BITS>
constexpr int kQuads = BITS == 1 ? 8 : 5;
static_assert(kQuads<1> * 2 * 255 * 8 < 32768 && kQuads<2> * 2 * 255 * 12 < 32768, "sums of 16 bits");

// Half h of some quads' bytes, nibble by nibble: four fields of each vector masked where they lie, their products summed
// in 16 bits and then added to total[block][h], scaled by the field's place in its nibble.
template <int BITS, bool whole>
inline void fields(const GemmBitsArgs& g, const uint8_t* a, const uint8_t* b, int first, int end, int h,
                   __m256i (*total)[2]) {
  constexpr int kBlocks = 8 / BITS;
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
  for (int group = 0; group < kBlocks / 4; ++group) {
    __m256i sum[4];
    for (auto& v : sum) v = _mm256_setzero_si256();
    const int count = whole ? kQuads<BITS> : end - first;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const int q = first + i;
      const __m256i x = whole ? broadcast4(a + 4 * q) : _mm256_set1_epi32(four(g, a, q));
      __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 64 * int64_t(q) + 32 * h));
      if (BITS == 2) w = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
      const __m256i high = _mm256_srli_epi16(w, 4);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int place = (4 * group + j) * BITS % 4;
        const __m256i nibble = (4 * group + j) * BITS < 4 ? w : high;
        const __m256i codes = _mm256_and_si256(nibble, _mm256_set1_epi8(char(((1 << BITS) - 1) << place)));
        sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(x, codes));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      total[4 * group + j][h] = _mm256_add_epi32(total[4 * group + j][h], _mm256_madd_epi16(sum[j], ones));
  }
}

// One row times one panel; half h of a block holds columns 8 h .. 8 h + 7.
template <int BITS>
void affine(const GemmBitsArgs& g, const uint8_t* b, int m, int column, __m256i constant) {
  constexpr int kBlocks = 8 / BITS;
  const uint8_t* a = g.a + m * g.lda;
  const int quads = (g.k + 3) / 4;
  __m256i total[kBlocks][2];
  for (auto& block : total) block[0] = block[1] = _mm256_setzero_si256();
  int q = 0;
  for (; 4 * (q + kQuads<BITS>) <= g.k; q += kQuads<BITS>)
    for (int h = 0; h < 2; ++h) fields<BITS, true>(g, a, b, q, 0, h, total);
  for (int h = 0; h < 2; ++h) fields<BITS, false>(g, a, b, q, quads, h, total);
  const __m256i step = _mm256_set1_epi32(g.step);
  for (int j = 0; j < kBlocks; ++j)
    for (int h = 0; h < 2; ++h) {
      const __m256i acc = _mm256_srl_epi32(total[j][h], _mm_cvtsi32_si128(j * BITS % 4));
      store(g, _mm256_add_epi32(_mm256_mullo_epi32(acc, step), constant), m, column + 16 * j + 8 * h);
    }
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

// All rows take a panel before the next one is read.
void gemm_bits(const GemmBitsArgs& g) {
  constexpr int kRows = 8;
  const int width = g.bits == 1 ? 128 : 64;
  for (int first = 0; first < g.m; first += kRows) {
    const int end = std::min(g.m, first + kRows);
    __m256i constant[kRows];
    for (int m = first; m < end; ++m) {
      int32_t sum = 0;
      for (int k = 0; k < g.k; ++k) sum += g.a[m * g.lda + k];
      constant[m - first] = _mm256_set1_epi32(int32_t(uint32_t(sum) * uint32_t(g.base)));
    }
    for (int column = 0; column < g.n; column += width)
      for (int m = first; m < end; ++m) {
        const uint8_t* b = g.b + column / width * g.b_panel;
        switch (g.bits) {
          case 1: affine<1>(g, b, m, column, constant[m - first]); break;
          case 2: affine<2>(g, b, m, column, constant[m - first]); break;
          default:
            nibbles(g, b, m, column);
            nibbles(g, b + 64, m, column + 32);
        }
      }
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
