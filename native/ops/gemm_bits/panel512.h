// Packed codes expanded in registers. A byte holds codes of several blocks of columns, so that all of its fields meet the
// same four activations. Fields of one and two bits are masked where they lie and summed at their own power of two; the
// highest costs no mask: the byte as it is, minus the other fields' sums. Four bits go through a table of 16 bytes.
#pragma once

#include <cstring>

#include "ops/avx512.h"

namespace pw {
namespace {

constexpr int kAhead = 1536;  // bytes that the stream of codes is fetched ahead

PW_INLINE __m512i four(const uint8_t* p, int bytes) {
  int32_t v = 0;
  std::memcpy(&v, p, size_t(bytes));
  return _mm512_set1_epi32(v);
}

// Sums of a row's activations, in every lane.
__m512i row_sum(const uint8_t* a, int k) {
  __m512i sum = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int i = 0; i < k; i += 64) dot4(sum, _mm512_maskz_loadu_epi8(head64(k - i), a + i), ones);
  return _mm512_set1_epi32(_mm512_reduce_add_epi32(sum));
}

template <int BITS>
struct Fields {  // of a vector of bytes, as operands of products
  static constexpr int count = 8 / BITS;
  static PW_INLINE void of(__m512i w, __m512i table, __m512i* v) {
    if constexpr (BITS == 4) {  // a permute of bytes reads six bits of an index, and the table stands there four times
#if defined(__AVX512VBMI__)
      v[0] = _mm512_permutexvar_epi8(w, table);
      v[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(w, 4), table);
#else
      const __m512i index = _mm512_set1_epi8(15);
      v[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(w, index));
      v[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(w, 4), index));
#endif
    } else {
#pragma GCC unroll 8
      for (int j = 0; j + 1 < count; ++j)
        v[j] = _mm512_and_si512(w, _mm512_set1_epi8(char(((1 << BITS) - 1) << (BITS * j))));
      v[count - 1] = w;
    }
  }
};

// MR rows times one panel; phases along K keep enough sums under way.
template <int MR, int BITS>
__attribute__((noinline)) void panel(const GemmBitsArgs& g, const Finish& f, const __m512i* sums, __m512i table, int m,
                                     int column) {
  constexpr int kBlocks = BITS == 1 ? 8 : 4, kFields = 8 / BITS, kVectors = kBlocks / kFields;
  constexpr int kPhases = MR * kBlocks >= 12 ? 1 : MR * kBlocks >= 8 ? 2 : 4;
  __m512i acc[kPhases][MR][kBlocks];
#pragma GCC unroll 4
  for (int p = 0; p < kPhases; ++p)
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kBlocks; ++j) acc[p][i][j] = _mm512_setzero_si512();
  const uint8_t* b = g.b + column / (16 * kBlocks) * g.b_panel;
  const uint8_t* a[MR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) a[i] = g.a + (m + i) * g.lda;
  const int quads = g.k / 4;
  int q = 0;
  for (; q + kPhases <= quads; q += kPhases) {
#pragma GCC unroll 4
    for (int p = 0; p < kPhases; ++p) {
      __m512i x[MR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) x[i] = four(a[i] + 4 * (q + p), 4);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(b + kAhead), _MM_HINT_T0);
        __m512i w[kFields];
        Fields<BITS>::of(_mm512_loadu_si512(b), table, w);
        b += 64;
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kFields; ++j) dot4(acc[p][i][v * kFields + j], x[i], w[j]);
      }
    }
  }
  for (; 4 * q < g.k; ++q) {
    const int bytes = g.k - 4 * q < 4 ? g.k - 4 * q : 4;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, b += 64) {
      __m512i w[kFields];
      Fields<BITS>::of(_mm512_loadu_si512(b), table, w);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m512i x = four(a[i] + 4 * q, bytes);
#pragma GCC unroll 8
        for (int j = 0; j < kFields; ++j) dot4(acc[0][i][v * kFields + j], x, w[j]);
      }
    }
  }
  const __m512i step = _mm512_set1_epi32(g.step), base = _mm512_set1_epi32(g.base);
  const Epilogue& e = f.e;
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    __m512i s[kBlocks];
#pragma GCC unroll 8
    for (int j = 0; j < kBlocks; ++j) {
      s[j] = acc[0][i][j];
#pragma GCC unroll 4
      for (int p = 1; p < kPhases; ++p) s[j] = _mm512_add_epi32(s[j], acc[p][i][j]);
    }
    if constexpr (BITS < 4) {
      __m512i others = s[0];
#pragma GCC unroll 8
      for (int j = 1; j + 1 < kBlocks; ++j) others = _mm512_add_epi32(others, s[j]);
      // the highest field counts as a signed number: -1 or 0 of one bit, the code minus 2 of two (one bit is flipped)
      __m512i& last = s[kBlocks - 1];
      if constexpr (BITS == 1) last = _mm512_srai_epi32(_mm512_sub_epi32(others, last), 7);
      else last = _mm512_add_epi32(_mm512_srai_epi32(_mm512_sub_epi32(last, others), 6), _mm512_slli_epi32(sums[i], 1));
#pragma GCC unroll 8
      for (int j = 1; j + 1 < kBlocks; ++j) s[j] = _mm512_srai_epi32(s[j], BITS * j);
      const __m512i constant = _mm512_mullo_epi32(sums[i], base);
#pragma GCC unroll 8
      for (int j = 0; j < kBlocks; ++j) s[j] = _mm512_add_epi32(_mm512_mullo_epi32(s[j], step), constant);
    }
#pragma GCC unroll 2
    for (int h = 0; h < kBlocks / 4; ++h) {
      const int first = column + 64 * h;
      if (first >= g.n) break;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        s[4 * h + j] = _mm512_add_epi32(s[4 * h + j], _mm512_loadu_si512(e.bias + g.n0 + first + 16 * j));
      Columns columns(g.n0 + first, g.n - first, 4);
      const int64_t r = g.r_offset[m + i] + first;
      store_row<4, kGeneral>(f, s + 4 * h, columns, g.m0 + m + i, e.residual ? e.residual + r : nullptr,
                             e.addend ? e.addend + r : nullptr, g.c, g.c_offset[m + i] + first);
    }
  }
}

// All rows take a panel before the next one is read.
template <int BITS>
void all_rows(const GemmBitsArgs& g) {
  const Finish f(*g.epilogue);
  constexpr int kMost = BITS == 1 ? 2 : 4, kRows = 8;
  __m512i sums[kRows], table = _mm512_setzero_si512();
  if (BITS == 4) table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g.table)));
  for (int first = 0; first < g.m; first += kRows) {
    const int end = g.m - first < kRows ? g.m : first + kRows;
    for (int m = first; BITS < 4 && m < end; ++m) sums[m - first] = row_sum(g.a + m * g.lda, g.k);
    for (int column = 0; column < g.n; column += BITS == 1 ? 128 : 64)
      for (int m = first; m < end;) {
        const __m512i* s = sums + (m - first);
        const int left = end - m;
        if (kMost == 4 && left >= 4) panel<kMost, BITS>(g, f, s, table, m, column), m += kMost;
        else if (kMost == 4 && left == 3) panel<kMost - kMost / 4, BITS>(g, f, s, table, m, column), m += 3;
        else if (left >= 2) panel<2, BITS>(g, f, s, table, m, column), m += 2;
        else panel<1, BITS>(g, f, s, table, m, column), m += 1;
      }
  }
}

}  // namespace
}  // namespace pw
