// Grouped weights with vpdpbusd: integer sums of a group in registers, added to float sums beside them.
#if defined(__AVX512VNNI__)
#include <cstring>

#include "ops/avx512.h"

namespace pw::avx512 {
namespace {

constexpr int kPanelBytes = 24 << 10;  // weights of a panel of columns that stay in the first cache while rows pass

// MR rows times NB blocks of 16 columns, groups first .. last - 1; float sums wait in c between calls. Within a call they
// lie in t, which leaves the registers to the integer sums.
template <int MR, int NB>
void tile(const GemmGroupedArgs& g, int m, int block, int first, int last) {
  constexpr int kChains = MR == 1 ? 2 : 1;  // a single row is bound by latency: two integer sums, whose order is free
  const int quads = (g.group_len + 3) / 4, column = 16 * block;
  const Columns columns(column, g.n - column, NB);
  float* c = g.c + m * g.ldc + column;
  alignas(64) float t[MR][16 * NB];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NB; ++j)
      _mm512_store_ps(t[i] + 16 * j,
                      first ? _mm512_maskz_loadu_ps(columns.part[j], c + i * g.ldc + 16 * j) : _mm512_setzero_ps());
  __m512i zero[MR];
  for (int i = 0; i < MR; ++i) zero[i] = _mm512_set1_epi32(g.row_zero[int64_t(m + i) * g.row_step]);
  const int8_t* b = g.b + block * g.b_block + int64_t(first) * quads * 64;
  for (int group = first; group < last; ++group) {
    const uint8_t* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) a[i] = g.a + (m + i) * g.lda + int64_t(group) * g.group_len;
    const float* scale = g.scale + group * g.step + column;
    const int32_t* sums = g.colsum + group * g.step + column;
    __m512i acc[MR][NB], other[NB];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_mullo_epi32(zero[i], _mm512_loadu_si512(sums + 16 * j));
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) other[j] = _mm512_setzero_si512();
    int q = 0;
    for (; q + kChains <= quads; q += kChains) {
      __m512i w[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * g.b_block);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const __m512i x = broadcast4(a[i] + 4 * q);
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) dot4(acc[i][j], x, w[j]);
      }
      b += 64;
      if (kChains == 2) {
        const __m512i x = broadcast4(a[0] + 4 * q + 4);
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) dot4m(other[j], x, b + j * g.b_block);
        b += 64;
      }
    }
    if (q < quads) {
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) dot4m(other[j], broadcast4(a[0] + 4 * q), b + j * g.b_block);
      b += 64;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        const __m512i sum = kChains == 2 ? _mm512_add_epi32(acc[i][j], other[j]) : acc[i][j];
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + 16 * j));
        _mm512_store_ps(t[i] + 16 * j, _mm512_add_ps(_mm512_load_ps(t[i] + 16 * j), part));
      }
  }
  for (int i = 0; i < MR; ++i) {
    const __m512 row = _mm512_set1_ps(g.row_scale[int64_t(m + i) * g.row_step]);
    for (int j = 0; j < NB; ++j) {
      __m512 y = _mm512_load_ps(t[i] + 16 * j);
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
  if constexpr (MR > 8)
    for (; m + 8 <= g.m; m += 8) tile<8, NB>(g, m, block, first, last);
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
        case 4: rows_of<6, 4>(g, block, first, last); break;
        case 3: rows_of<8, 3>(g, block, first, last); break;
        case 2: rows_of<12, 2>(g, block, first, last); break;
        default: rows_of<14, 1>(g, block, first, last); break;
      }
    }
    block += width;
  }
}

}  // namespace pw::avx512

#endif  // __AVX512VNNI__
