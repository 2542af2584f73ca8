// Products of bf16 numbers in registers, 16 columns a vector: the loops; what multiplies a pair is the unit's own.
#pragma once

#include <cstring>
#include <utility>

#include "ops/real512.h"

namespace pw {
namespace {

PW_REAL_INLINE __m512i pairs_of(const uint16_t* p, bool whole) {
  if (!whole) return _mm512_set1_epi32(p[0]);
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Dot: acc += x . w, two products a lane, for the NB vectors of a row.
template <class Dot, int MR, int NB>
struct Tile512 {
  static PW_REAL_INLINE void step(const uint16_t* const* a, int k, bool whole, const uint16_t* b, int64_t block,
                                  __m512 (&acc)[MR][NB]) {
    __m512i w[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) w[j] = _mm512_loadu_si512(b + j * block);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
      const __m512i x = pairs_of(a[i] + k, whole);
      Dot::template row<NB>(acc[i], x, w);
    }
  }

  static void run(const GemmBf16Args& g, int m, int block) {
    __m512 acc[MR][NB];
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_ps();
    const uint16_t* b = g.b + block * g.b_block;
    for (int s = 0; s < g.segments; ++s) {
      const uint16_t* a[MR];
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i) a[i] = g.a + g.row_offset[m + i] + g.seg_offset[s];
      int k = 0;
      for (; k + 1 < g.seg_len; k += 2, b += 32) step(a, k, true, b, g.b_block, acc);
      if (k < g.seg_len) {
        step(a, k, false, b, g.b_block, acc);
        b += 32;
      }
    }
    __m512 done[MR * NB];
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) done[i * NB + j] = acc[i][j];
    store_tile<NB>(g, done, MR, m, block);
  }
};

template <class Dot, int NB, int... I>
void rows_of(const GemmBf16Args& g, int block, std::integer_sequence<int, I...>) {
  using Run = void (*)(const GemmBf16Args&, int, int);
  static constexpr Run tiles[] = {Tile512<Dot, I + 1, NB>::run...};
  constexpr int most = int(sizeof...(I));
  for (int m = 0, pieces = (g.m + most - 1) / most; pieces > 0; --pieces) {
    const int rows = (g.m - m + pieces - 1) / pieces;
    tiles[rows - 1](g, m, block);
    m += rows;
  }
}

template <class Dot, int MR>
void multiply_bf16(const GemmBf16Args& g) {
  const int blocks = (g.n + 15) / 16;
  int block = 0;
  if (g.m <= 4)
    for (; block + 4 <= blocks; block += 4) rows_of<Dot, 4>(g, block, std::make_integer_sequence<int, 4>());
  for (; block + 2 <= blocks; block += 2) rows_of<Dot, 2>(g, block, std::make_integer_sequence<int, MR>());
  if (block < blocks) rows_of<Dot, 1>(g, block, std::make_integer_sequence<int, MR>());
}

}  // namespace
}  // namespace pw
