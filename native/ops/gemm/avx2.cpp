// Products of u8 and s8, or of u8 and s16, without VNNI, exact. Where weights are split (`Rest`), neighbours are multiplied and added in 16 bits;
// else bytes are widened to 16 bits before they are multiplied and added in pairs.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "ops/avx2.h"

namespace pw::avx2 {
namespace {

inline __m256i weights(const int8_t* b) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
}
inline __m256i weights(const int16_t* b) { return load(b); }

// MR rows times one block of 16 columns; accumulator j of a row holds columns 4j .. 4j + 3, two partial sums each.
template <int MR, class T>
void tile(const GemmArgs& g, int m, int block) {
  __m256i acc[MR][4];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm256_setzero_si256();
  const T* b = reinterpret_cast<const T*>(g.b + block * g.b_block);
  const int quads = (g.seg_len + 3) / 4;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 64;
  for (int s = 0; s < g.segments; ++s) {
    const uint8_t* a[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
    for (int q = 0; q < quads; ++q) {
      __m256i x[MR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        int32_t v;
        std::memcpy(&v, a[i] + 4 * q, 4);
        x[i] = _mm256_cvtepu8_epi16(_mm_set1_epi32(v));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i w = weights(b + 16 * j);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(x[i], w));
      }
      b += 64;
    }
    b += skip;
  }
  const Epilogue& e = *g.epilogue;
  const int column = 16 * block;
  for (int i = 0; i < MR; ++i) {
    const int64_t at = g.c_offset[m + i];
    if (at < 0) continue;
    // pairs of partial sums to columns: hadd works in halves, the permutation puts them in order
    const __m256i low = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[i][0], acc[i][1]), 0xd8);
    const __m256i high = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[i][2], acc[i][3]), 0xd8);
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    store16(e, low, high, g.n0 + column, g.n - column, g.m0 + m + i, r, addend, g.c, at + column);
  }
}

// acc[i][j]: row i, columns 8j .. 8j + 7.
template <int MR>
inline void add_quad(__m256i (&acc)[MR][2], const uint8_t* const* a, int64_t at, const int8_t* b) {
  const __m256i one = _mm256_set1_epi16(1);
  const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32));
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    int32_t v;
    std::memcpy(&v, a[i] + at, 4);
    const __m256i x = _mm256_set1_epi32(v);
    acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w0), one));
    acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w1), one));
  }
}

template <int MR>
void split_tile(const GemmArgs& g, int m, int block) {
  __m256i acc[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  const int8_t* b = g.b + block * g.b_block;
  const Rest& rest = *reinterpret_cast<const Rest*>(b + g.b_rest);
  const int quads = (g.seg_len + 3) / 4;
  const int64_t skip = int64_t(g.seg_pad / 4 - quads) * 64;
  const uint8_t* rows[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) rows[i] = g.a + g.row_offset[m + i];
  for (int s = 0; s < g.segments; ++s) {
    const uint8_t* a[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) a[i] = rows[i] + g.seg_offset[s];
    for (int q = 0; q < quads; ++q, b += 64) add_quad<MR>(acc, a, 4 * q, b);
    b += skip;
  }
  const Rest::Place* place = rest.places();
  const int8_t* left = rest.codes();
  for (int i = 0; i < rest.count; ++i, left += 64)
    add_quad<MR>(acc, rows, g.seg_offset[place[i].segment] + 4 * place[i].quad, left);
  const Epilogue& e = *g.epilogue;
  const int column = 16 * block;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const int64_t at = g.c_offset[m + i];
    if (at < 0) continue;
    const uint8_t* r = e.residual ? e.residual + g.r_offset[m + i] + column : nullptr;
    const float* addend = e.addend ? e.addend + g.r_offset[m + i] + column : nullptr;
    store16(e, acc[i][0], acc[i][1], g.n0 + column, g.n - column, g.m0 + m + i, r, addend, g.c, at + column);
  }
}

constexpr int kRows = 24;  // stay in the first cache while all columns pass

template <class T>
void in_tiles(const GemmArgs& g) {
  for (int from = 0; from < g.m; from += kRows)
    for (int block = 0, end = from + kRows < g.m ? from + kRows : g.m; block * 16 < g.n; ++block) {
      int m = from;
      for (; m + 2 <= end; m += 2) tile<2, T>(g, m, block);
      for (; m < end; ++m) tile<1, T>(g, m, block);
    }
}

}  // namespace

void gemm(const GemmArgs& g) {
  if (!g.b_rest) return in_tiles<int8_t>(g);
  for (int from = 0; from < g.m; from += kRows)
    for (int block = 0, end = from + kRows < g.m ? from + kRows : g.m; block * 16 < g.n; ++block) {
      int m = from;
      for (; m + 4 <= end; m += 4) split_tile<4>(g, m, block);
      for (; m < end; ++m) split_tile<1>(g, m, block);
    }
}

void gemm_wide(const GemmArgs& g) { in_tiles<int16_t>(g); }

void epilogue(const EpilogueArgs& a) {
  for (int n = 0; n < a.n; n += 8) {
    alignas(32) int32_t v[8] = {};
    std::memcpy(v, a.acc + n, 4 * (a.n - n < 8 ? a.n - n : 8));
    store8(*a.epilogue, _mm256_load_si256(reinterpret_cast<const __m256i*>(v)), n, a.n - n, a.row,
           a.residual ? a.residual + n : nullptr, a.addend ? a.addend + n : nullptr, a.y, n);
  }
}

}  // namespace pw::avx2

#endif  // __AVX2__
