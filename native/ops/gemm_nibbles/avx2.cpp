// Packed weights of 4 bits without VNNI, exact: four products of a byte and a code fit 16 bits (4 * 2 * 255 * 15 = 30600).
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "ops/avx2.h"
#include "ops/gemm_nibbles/panel.h"

namespace pw::avx2 {

void gemm_grouped(const GemmGroupedArgs&);

namespace {

constexpr int kAhead = 2048;

// Codes of 8 columns: of the low nibbles' block, and of the high ones'.
inline void fields(const uint8_t* b, __m256i* v) {
  const __m256i low = _mm256_set1_epi8(15), pair = load(b);
  v[0] = _mm256_and_si256(pair, low);
  v[1] = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low);
}

inline __m256 scale_at(const GemmNibblesArgs& g, const uint8_t* p, int column) {
  if (g.scale_bytes == 2) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * column)));
  return _mm256_loadu_ps(reinterpret_cast<const float*>(p + 4 * column));
}

inline __m256i wide(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// MR rows times 8 columns of each of two blocks: half 0 .. 3 of a panel's vectors.
template <int MR>
void quarter(const GemmNibblesArgs& g, const int32_t* offsets, int m, int column, int half) {
  const __m256i ones = _mm256_set1_epi8(1);
  const int quads = g.group_len / 4;
  const uint8_t* b = g.b + column / 64 * g.b_panel + 32 * half;
  const int at[2] = {half / 2 * 32 + half % 2 * 8, half / 2 * 32 + half % 2 * 8 + 16};
  const uint8_t* a[MR];
  __m256 t[MR][2];
  for (int i = 0; i < MR; ++i) {
    a[i] = g.a + (m + i) * g.lda;
    t[i][0] = t[i][1] = _mm256_setzero_ps();
  }
  for (int group = 0; group < g.groups; ++group) {
    __m256i acc[MR][2], sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < MR; ++i)
      acc[i][0] = acc[i][1] = _mm256_set1_epi32(offsets[int64_t(i) * g.groups + group]);
    for (int q = 0; q < quads;) {
      const int end = q + 4 < quads ? q + 4 : quads;
      __m256i pairs[MR][2], codes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int i = 0; i < MR; ++i) pairs[i][0] = pairs[i][1] = _mm256_setzero_si256();
      for (; q < end; ++q, b += 128) {
        __m256i v[2];
        if (half == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(b + kAhead), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(b + kAhead + 64), _MM_HINT_T0);
        }
        fields(b, v);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) codes[j] = _mm256_add_epi16(codes[j], _mm256_maddubs_epi16(ones, v[j]));
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const __m256i x = broadcast4(a[i]);
          a[i] += 4;
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) pairs[i][j] = _mm256_add_epi16(pairs[i][j], _mm256_maddubs_epi16(x, v[j]));
        }
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        sum[j] = _mm256_add_epi32(sum[j], wide(codes[j]));
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i][j] = _mm256_add_epi32(acc[i][j], wide(pairs[i][j]));
      }
    }
    const uint8_t* scales = b - 32 * half;
    for (int j = 0; j < 2; ++j) {
      const __m256 scale = scale_at(g, scales, at[j]);
      for (int i = 0; i < MR; ++i) {
        const __m256i zero = _mm256_set1_epi32(g.row_zero[int64_t(m + i) * g.row_step]);
        const __m256i exact = _mm256_sub_epi32(acc[i][j], _mm256_mullo_epi32(sum[j], zero));
        t[i][j] = _mm256_add_ps(t[i][j], _mm256_mul_ps(_mm256_cvtepi32_ps(exact), scale));
      }
    }
    b += 64 * g.scale_bytes;
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 2; ++j) {
      const int first = column + at[j], count = g.n - first < 8 ? g.n - first : 8;
      if (count <= 0) continue;
      __m256 y = _mm256_mul_ps(t[i][j], _mm256_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]));
      if (g.bias) y = _mm256_add_ps(y, _mm256_loadu_ps(g.bias + first));
      alignas(32) float part[8];
      _mm256_store_ps(part, y);
      std::memcpy(g.c + (m + i) * g.ldc + first, part, size_t(4 * count));
    }
}

void few_rows(const GemmNibblesArgs& g) {
  int32_t* offsets = static_cast<int32_t*>(g.scratch);
  for (int m = 0; m < g.m; ++m)
    for (int group = 0; group < g.groups; ++group) {
      const uint8_t* a = g.a + m * g.lda + int64_t(group) * g.group_len;
      int32_t sum = 0;
      for (int k = 0; k < g.group_len; ++k) sum += a[k];
      offsets[int64_t(m) * g.groups + group] = offset(sum, g.row_zero[int64_t(m) * g.row_step], g.group_len);
    }
  for (int column = 0; column < g.n; column += 64)
    for (int half = 0; half < 4; ++half)
      for (int m = 0; m < g.m;) {
        const int32_t* at = offsets + int64_t(m) * g.groups;
        if (g.m - m >= 2) quarter<2>(g, at, m, column, half), m += 2;
        else quarter<1>(g, at, m, column, half), m += 1;
      }
}

void widen(const GemmNibblesArgs& g, const uint8_t* b, const Widened& to) {
  const __m256i ones = _mm256_set1_epi8(1), eight = _mm256_set1_epi8(8);
  const int64_t block = int64_t(g.groups) * g.group_len * 16;
  for (int group = 0; group < g.groups; ++group, b += int64_t(g.group_len) * 32 + 64 * g.scale_bytes) {
    for (int half = 0; half < 4; ++half) {
      __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      int8_t* codes = to.codes + half / 2 * 2 * block + int64_t(group) * g.group_len * 16 + half % 2 * 32;
      for (int k = 0; k < g.group_len; k += 4, codes += 64) {
        __m256i v[2];
        fields(b + k * 32 + 32 * half, v);
        for (int j = 0; j < 2; ++j) {
          sum[j] = _mm256_add_epi32(sum[j], wide(_mm256_maddubs_epi16(ones, v[j])));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j * block), _mm256_sub_epi8(v[j], eight));
        }
      }
      for (int j = 0; j < 2; ++j) {
        const int column = half / 2 * 32 + half % 2 * 8 + 16 * j;
        _mm256_storeu_ps(to.scale + group * 64 + column, scale_at(g, b + int64_t(g.group_len) * 32, column));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.colsum + group * 64 + column),
                            _mm256_sub_epi32(_mm256_set1_epi32(8 * g.group_len), sum[j]));
      }
    }
  }
}

}  // namespace

void gemm_nibbles(const GemmNibblesArgs& g) {
  if (g.m <= kFewNibbleRows) return few_rows(g);
  by_panels(g, [&](const uint8_t* b, const Widened& to) { widen(g, b, to); }, gemm_grouped);
}

}  // namespace pw::avx2

#endif  // __AVX2__
