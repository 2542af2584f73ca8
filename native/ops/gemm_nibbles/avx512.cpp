// Packed weights of 4 bits with vpdpbusd. Codes stay 0 .. 15; what that adds is taken off again group by group, from sums
// of the activations, made before, and of the codes, made beside the products.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/gemm_nibbles/codes512.h"
#include "ops/gemm_nibbles/panel.h"

namespace pw::avx512 {

void gemm_grouped(const GemmGroupedArgs&);

namespace {

constexpr int kShort = 2048;  // sums of so many codes are numbers of 16 bits

// MR rows times a panel.
template <int MR, int SCALE>
__attribute__((noinline)) void panel(const GemmNibblesArgs& g, const int32_t* offsets, int m, int column) {
  const __m512i ones = _mm512_set1_epi8(1);
  const bool narrow = g.group_len <= kShort;
  const int quads = g.group_len / 4;
  const uint8_t* b = g.b + column / 64 * g.b_panel;
  alignas(64) float t[MR][64];
  const uint8_t* a[MR];
  __m512i zero[MR];
  for (int i = 0; i < MR; ++i) {
    a[i] = g.a + (m + i) * g.lda;
    zero[i] = _mm512_set1_epi32(g.row_zero[int64_t(m + i) * g.row_step]);
    for (int j = 0; j < 4; ++j) _mm512_store_ps(t[i] + 16 * j, _mm512_setzero_ps());
  }
  for (int group = 0; group < g.groups; ++group) {
    __m512i acc[MR][4], sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sum[j] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_set1_epi32(offsets[int64_t(i) * g.groups + group]);
    }
    for (int q = 0; q < quads; ++q) {
      __m512i v[4];
      fields(b, v);
      b += 128;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) dot4(sum[j], v[j], ones);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m512i x = broadcast4(a[i]);
        a[i] += 4;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) dot4(acc[i][j], x, v[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 scale = scale_at<SCALE>(b, j);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m512i taken = narrow ? _mm512_madd_epi16(sum[j], zero[i]) : _mm512_mullo_epi32(sum[j], zero[i]);
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[i][j], taken)), scale);
        _mm512_store_ps(t[i] + 16 * j, _mm512_add_ps(_mm512_load_ps(t[i] + 16 * j), part));
      }
    }
    b += 64 * SCALE;
  }
  const Columns columns(column, g.n - column, 4);
  for (int i = 0; i < MR; ++i) {
    const __m512 row = _mm512_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]);
    for (int j = 0; j < 4 && columns.part[j]; ++j) {
      __m512 y = _mm512_mul_ps(_mm512_load_ps(t[i] + 16 * j), row);
      if (g.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(g.bias + column + 16 * j));
      _mm512_mask_storeu_ps(g.c + (m + i) * g.ldc + column + 16 * j, columns.part[j], y);
    }
  }
}

// Sum of `len` bytes.
int32_t sum_of(const uint8_t* a, int len) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < len; i += 64)
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(head64(len - i), a + i), _mm512_setzero_si512()));
  return int32_t(_mm512_reduce_add_epi64(sum));
}

template <int SCALE>
void few_rows(const GemmNibblesArgs& g) {
  int32_t* offsets = reinterpret_cast<int32_t*>(static_cast<char*>(g.scratch));
  for (int m = 0; m < g.m; ++m)
    for (int group = 0; group < g.groups; ++group) {
      const int32_t sum = sum_of(g.a + m * g.lda + int64_t(group) * g.group_len, g.group_len);
      offsets[int64_t(m) * g.groups + group] = offset(sum, g.row_zero[int64_t(m) * g.row_step], g.group_len);
    }
  for (int column = 0; column < g.n; column += 64)
    for (int m = 0; m < g.m;) {
      const int32_t* at = offsets + int64_t(m) * g.groups;
      const int left = g.m - m;
      if (left >= 4) panel<4, SCALE>(g, at, m, column), m += 4;
      else if (left == 3) panel<3, SCALE>(g, at, m, column), m += 3;
      else if (left == 2) panel<2, SCALE>(g, at, m, column), m += 2;
      else panel<1, SCALE>(g, at, m, column), m += 1;
    }
}

template <int SCALE>
void widen(const GemmNibblesArgs& g, const uint8_t* b, const Widened& to) {
  const __m512i ones = _mm512_set1_epi8(1), eight = _mm512_set1_epi8(8), all = _mm512_set1_epi32(8 * g.group_len);
  const int64_t block = int64_t(g.groups) * g.group_len * 16;
  int8_t* codes = to.codes;
  for (int group = 0; group < g.groups; ++group) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_setzero_si512();
    for (int k = 0; k < g.group_len; k += 4, b += 128, codes += 64) {
      __m512i v[4];
      fields(b, v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        dot4(sum[j], v[j], ones);
        _mm512_storeu_si512(codes + j * block, _mm512_sub_epi8(v[j], eight));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_ps(to.scale + group * 64 + 16 * j, scale_at<SCALE>(b, j));
      _mm512_storeu_si512(to.colsum + group * 64 + 16 * j, _mm512_sub_epi32(all, sum[j]));
    }
    b += 64 * SCALE;
  }
}

}  // namespace

void gemm_nibbles(const GemmNibblesArgs& g) {
  if (g.m <= kFewNibbleRows) return g.scale_bytes == 2 ? few_rows<2>(g) : few_rows<4>(g);
  by_panels(g, [&](const uint8_t* b, const Widened& to) {
    g.scale_bytes == 2 ? widen<2>(g, b, to) : widen<4>(g, b, to);
  }, gemm_grouped);
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
