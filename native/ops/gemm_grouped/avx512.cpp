// Grouped weights with vpdpbusd: integer sums of a group in registers, added to float sums beside them.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

constexpr int kPanelBytes = 24 << 10;  // weights of a panel of columns that stay in the first cache while rows pass

PW_INLINE __m512i broadcast4(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// MR rows times NB blocks of 16 columns, groups first .. last - 1; float sums wait in c between calls.
template <int MR, int NB>
void tile(const GemmGroupedArgs& g, int m, int block, int first, int last) {
  constexpr int kChains = MR == 1 ? 2 : 1;  // a single row is bound by latency: two integer sums, whose order is free
  const int quads = (g.group_len + 3) / 4, column = 16 * block;
  const Columns columns(column, g.n - column, NB);
  float* c = g.c + m * g.ldc + column;
  __m512 t[MR][NB];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j)
      t[i][j] = first ? _mm512_maskz_loadu_ps(columns.part[j], c + i * g.ldc + 16 * j) : _mm512_setzero_ps();
  const int8_t* b = g.b + block * g.b_block + int64_t(first) * quads * 64;
  const uint8_t* a = g.a + m * g.lda + int64_t(first) * g.group_len;
  for (int group = first; group < last; ++group, a += g.group_len) {
    const float* scale = g.scale + group * g.step + column;
    const int32_t* sums = g.colsum + group * g.step + column;
    __m512i acc[kChains][MR][NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512i zero = _mm512_set1_epi32(g.row_zero[int64_t(m + i) * g.row_step]);
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        acc[0][i][j] = _mm512_mullo_epi32(zero, _mm512_loadu_si512(sums + 16 * j));
        if (kChains == 2) acc[kChains - 1][i][j] = _mm512_setzero_si512();
      }
    }
    int q = 0;
    for (; q + kChains <= quads; q += kChains)
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain, b += 64) {
        __m512i w[NB];
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * g.b_block);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const __m512i x = broadcast4(a + i * g.lda + 4 * (q + chain));
#pragma GCC unroll 4
          for (int j = 0; j < NB; ++j) dot4(acc[chain][i][j], x, w[j]);
        }
      }
    for (; q < quads; ++q, b += 64)
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j)
          dot4(acc[0][i][j], broadcast4(a + i * g.lda + 4 * q), _mm512_loadu_si512(b + j * g.b_block));
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        __m512i sum = acc[0][i][j];
        if (kChains == 2) sum = _mm512_add_epi32(sum, acc[kChains - 1][i][j]);
        t[i][j] = _mm512_add_ps(t[i][j], _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + 16 * j)));
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const __m512 row = _mm512_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]);
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      __m512 y = t[i][j];
      if (last == g.groups) {
        y = _mm512_mul_ps(y, row);
        if (g.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(g.bias + column + 16 * j));
      }
      _mm512_mask_storeu_ps(c + i * g.ldc + 16 * j, columns.part[j], y);
    }
  }
}

template <int MR, int NB>
void rows_of(const GemmGroupedArgs& g, int block, int first, int last) {
  int m = 0;
  for (; m + MR <= g.m; m += MR) tile<MR, NB>(g, m, block, first, last);
  if constexpr (MR > 4)
    for (; m + 4 <= g.m; m += 4) tile<4, NB>(g, m, block, first, last);
  if constexpr (MR > 2)
    for (; m + 2 <= g.m; m += 2) tile<2, NB>(g, m, block, first, last);
  for (; m < g.m; ++m) tile<1, NB>(g, m, block, first, last);
}

}  // namespace

void gemm_grouped(const GemmGroupedArgs& g) {
  const int blocks = (g.n + 15) / 16, pieces = (blocks + 3) / 4, group_bytes = (g.group_len + 3) / 4 * 64;
  for (int i = 0, block = 0; i < pieces; ++i) {
    const int width = (blocks - block + pieces - i - 1) / (pieces - i);
    const int fitting = kPanelBytes / (group_bytes * width), chunk = g.m <= 3 ? g.groups : fitting > 1 ? fitting : 1;
    for (int first = 0; first < g.groups; first += chunk) {
      const int last = first + chunk < g.groups ? first + chunk : g.groups;
      switch (width) {
        case 4: rows_of<3, 4>(g, block, first, last); break;
        case 3: rows_of<4, 3>(g, block, first, last); break;
        case 2: rows_of<6, 2>(g, block, first, last); break;
        default: rows_of<8, 1>(g, block, first, last); break;
      }
    }
    block += width;
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
